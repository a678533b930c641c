"""A block of the model under torch.compile: one graph, which holds our ops and computes what eager computes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from machines import EXACT, Machine
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

import kernels
from llm.config import ModelConfig
from llm.model.transformer import Block, Context

CONFIG = ModelConfig(n_layers=1, d_model=32, n_heads=2, n_kv_heads=1, d_ff=48, vocab_size=64, max_seq_len=16)


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    with kernels.dispatch.using("triton"):
        yield


def run(device: str, dtype: torch.dtype, checkpointing: Any, compiling: dict[str, Any] | None) -> list[Tensor]:
    """The outputs and gradients of one block, on the same numbers each time."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    block = Block(CONFIG).to(device, dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(draw(*parameter.shape))
    cos, sin = kernels.rope_cos_sin(0, 16, CONFIG.head_size, CONFIG.rope_theta, device)
    doc_start = torch.tensor([0] * 10 + [10] * 6, dtype=torch.int32, device=device).expand(2, -1).contiguous()
    if compiling is not None:
        block.compile(fullgraph=True, **compiling)
    x, residual = draw(2, 16, 32), draw(2, 16, 32)
    outputs = block(x, residual, Context(cos, sin, doc_start, checkpointing=checkpointing))
    gradients = torch.autograd.grad(sum(output.sum() for output in outputs), [x, residual, *block.parameters()])
    return [*outputs, *gradients]


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_compiled_block_is_one_graph_and_equals_eager(machine: Machine, checkpointing: str) -> None:
    expected = run(machine.device, machine.dtype, checkpointing, None)
    assert counters["stats"]["unique_graphs"] == 0
    compiled = run(machine.device, machine.dtype, checkpointing, {"backend": "aot_eager"})
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for got, want in zip(compiled, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_the_graph_of_a_block_in_bf16_holds_our_ops() -> None:
    """On tensors that have shapes alone: the interpreter computes no bf16."""
    captured: list[set[str]] = []

    def capture(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        captured.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=capture, bw_compiler=capture)
    outputs = run("meta", torch.bfloat16, "none", {"backend": backend})
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    forward, backward = captured
    ops = ("attention", "rms_norm", "swiglu")
    assert {f"llm.{op}_forward.default" for op in ops} <= forward
    assert {f"llm.{op}_backward.default" for op in ops} <= backward
