"""Compares training steps with plain PyTorch and with transformers: `python -m benchmarks.bench_train_cpu --help`.

All contestants have the same model, random tokens, dtype and number of threads. Each runs in its own process. In a
round each of them takes one step; the table has the medians over the rounds. The speed-up is the median of the ratios
per round, because the speed of a host may change between rounds. A step is forward, backward, clipping and AdamW.

ours       what `llm train` runs, documents masked
plain      nn.Linear, F.scaled_dot_product_attention(is_causal=True), F.rms_norm, F.cross_entropy over whole logits,
           torch's fused AdamW; no documents. Compiled: torch.compile of the whole model
llama      transformers' LlamaForCausalLM with attn_implementation="sdpa", the loss its own, the same AdamW

In bf16 all keep fp32 weights: ours rounds them at each use, the others run under torch.autocast, as nanoGPT and
transformers' Trainer do. "of matmul" is the usual FLOPs per token relative to the best rate measured between rounds.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench_train import ABOVE_MATMUL_RATE
from benchmarks.timing import installed_version
from benchmarks.training_step import Batch, TrainingStep, random_batches, repeat
from llm import device_rates, metrics
from llm.atomic import atomic_text
from llm.config import Config, ModelConfig
from llm.config_file import load_config
from llm.errors import UserError
from llm.model.hf import to_hf
from llm.model.hf_config import hf_config
from llm.model.transformer import Transformer
from llm.training.batch_plan import Plan, make_plan
from llm.training.optim import make_optimizer
from llm.training.resolve import ASSUMED_VOCAB_SIZE
from llm.training.rules import follow
from llm.world import DTYPES

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CONTESTANTS = ("ours", "plain", "plain-compiled", "llama", "llama-compiled")


class PlainBlock(nn.Module):
    """The model as one writes it by hand: separate projections, and only torch's own fused ops."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_size
        width, kv_width = config.d_model, config.n_kv_heads * config.head_size
        self.norm1, self.norm2 = (nn.RMSNorm(width, eps=config.norm_eps) for _ in range(2))
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, kv_width, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, config.d_ff, bias=False) for _ in range(2))
        self.down = nn.Linear(config.d_ff, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, _ = x.shape
        h = self.norm1(x)
        q, k, v = (
            projection(h).view(b, s, heads, self.head_dim).transpose(1, 2)
            for projection, heads in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(out.transpose(1, 2).reshape(b, s, -1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-x2, x1), dim=-1) * sin).to(x.dtype)


class PlainModel(nn.Module):
    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        frequency = config.rope_theta ** -(torch.arange(0, config.head_size, 2) / config.head_size)
        angle = (torch.arange(seq_len)[:, None] * frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.head(self.norm(x))  # type: ignore[no-any-return]

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(input_ids).float().flatten(0, 1), labels.flatten())

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Takes weights with transformers' names."""
        part = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
        part |= {key: f"self_attn.{key}_proj" for key in "qkvo"}
        part |= {key: f"mlp.{key}_proj" for key in ("gate", "up", "down")}
        for name, parameter in self.named_parameters():
            match name.split("."):
                case ["layers", i, key, "weight"]:
                    name = f"model.layers.{i}.{part[key]}.weight"
                case ["embed", _]:
                    name = "model.embed_tokens.weight"
                case ["norm", _]:
                    name = "model.norm.weight"
                case _:
                    name = "lm_head.weight"
            parameter.copy_(weights[name])


def transformers_weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Returns the initial weights of every contestant, with transformers' names."""
    model = Transformer(config)
    model.init_weights(seed)
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        weights |= {key: part.clone() for key, part in to_hf(config, name, parameter.detach()).items()}
    return weights


def plain_model(config: ModelConfig, seq_len: int, weights: dict[str, Tensor]) -> nn.Module:
    model = PlainModel(config, seq_len)
    model.load(weights)
    return model


def llama_model(config: ModelConfig, weights: dict[str, Tensor]) -> nn.Module:
    import transformers

    settings = transformers.LlamaConfig(**hf_config(config, 1, 2), attn_implementation="sdpa")
    model = transformers.LlamaForCausalLM(settings)
    model.load_state_dict(weights)
    return model.train()  # type: ignore[no-any-return]


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["input_ids"], batch["labels"])  # type: ignore[no-any-return]


def llama_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["input_ids"], shift_labels=batch["labels"], labels=batch["labels"], use_cache=False).loss  # type: ignore[no-any-return]


class PlainLoop:
    """The step of a plain loop: forward (under autocast for bf16), backward, clipping, AdamW."""

    def __init__(self, config: Config, model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor]) -> None:
        self.model, self.loss, self.clip = model, loss, config.optimizer.grad_clip
        self.bf16 = config.train.precision == "bf16"
        self.optimizer = make_optimizer(model, config.optimizer, torch.float32)
        self.batches = random_batches(config, cpu_plan(config), torch.device("cpu"))

    def __call__(self) -> float:
        total = 0.0
        for batch in self.batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss = self.loss(self.model, batch) / len(self.batches)
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def contestant(name: str, config: Config) -> Callable[[], float]:
    """Returns a function that takes one training step and returns its loss."""
    family, _, compiled = name.partition("-")
    if family == "ours":
        return TrainingStep(config)
    assert config.data.seq_len is not None
    weights = transformers_weights(config.model, config.train.seed)
    if family == "plain":
        model, loss = plain_model(config.model, config.data.seq_len, weights), plain_loss
    else:
        model, loss = llama_model(config.model, weights), llama_loss
    if compiled:
        model.compile()
    return PlainLoop(config, model, loss)


def compete(name: str, config: Config, orders: Connection) -> None:
    """The process of a contestant. Sends the losses of two warm-up steps, then the seconds of a step per request."""
    step = contestant(name, config)
    orders.send([step(), step()])
    while orders.recv():
        begin = time.perf_counter()
        step()
        orders.send(time.perf_counter() - begin)


def cpu_plan(config: Config) -> Plan:
    return make_plan(config, 1, torch.device("cpu"), dtype=DTYPES[config.train.precision])


def answer(name: str, orders: Connection) -> Any:
    """Waits for what a contestant sends. Raises UserError if its process has ended."""
    try:
        return orders.recv()
    except EOFError:
        raise UserError(f"{name} has ended before its turn; its own message is above") from None


def measure(config: Config, names: Sequence[str], *, rounds: int, seconds: float) -> dict[str, Any]:
    """Lets the contestants take steps in turn until the rounds, or the seconds (at least one round), are over."""
    spawning = multiprocessing.get_context("spawn")
    orders, losses = {}, {}
    for name in names:  # one after another, because each uses all threads while it compiles
        orders[name], other = spawning.Pipe()
        spawning.Process(target=compete, args=(name, config, other), daemon=True).start()
        other.close()  # or a contestant that ends too early would be waited for without end
        losses[name] = answer(name, orders[name])
        print(f"{name}: losses {losses[name]}", file=sys.stderr)
    taken: dict[str, list[float]] = {name: [] for name in names}
    matmul: list[float] = []
    for _ in repeat(rounds, seconds):
        matmul.append(device_rates.measure_matmul_flops(torch.device("cpu"), DTYPES[config.train.precision]))
        for name in names:
            orders[name].send(True)
            taken[name].append(answer(name, orders[name]))
    for name in names:
        orders[name].send(False)
    plan = cpu_plan(config)  # measures the matmul rate again
    plan = replace(plan, matmul_flops=max(plan.matmul_flops, *matmul))
    speeds = {name: plan.tokens_per_step / statistics.median(times) for name, times in taken.items()}
    return {
        "config": config.model_dump(),
        "parameters": plan.parameters,
        "precision": config.train.precision,
        "seq_len": plan.seq_len,
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "rounds": len(matmul),
        "matmul_flops": plan.matmul_flops,
        "contestants": {
            name: {
                "step_seconds": taken[name],
                "tokens_per_second": speed,
                "matmul_fraction": plan.matmul_fraction(speed),
                "matmul_fraction_causal": plan.matmul_fraction(speed, causal=True),
                "losses": losses[name],
            }
            for name, speed in speeds.items()
        },
    }


def times_as_fast(ours: dict[str, Any], other: dict[str, Any]) -> float:
    """Returns the median of the ratios per round, whose steps ran directly one after another."""
    return statistics.median(b / a for a, b in zip(ours["step_seconds"], other["step_seconds"], strict=True))


def table(result: dict[str, Any]) -> str:
    found = result["contestants"]
    all_ours = [entry for name, entry in found.items() if name.startswith("ours")]
    best = max(all_ours, key=lambda entry: entry["tokens_per_second"], default=None)
    lines = [
        f"{Path(result['name']).stem}, {result['precision']}: {result['parameters']:,} parameters, "
        f"{result['accumulation']} x {result['micro_batch']} sequences of {result['seq_len']}, "
        f"{result['rounds']} rounds, matmul {result['matmul_flops'] / 1e9:.0f} GFLOP/s",
        "                 tokens/s   step ms  of matmul  (causal)  best of ours against it",
    ]
    for name, entry in found.items():
        ratio = "" if best is None or name.startswith("ours") else f"{times_as_fast(best, entry):.2f}"
        lines.append(
            f"{name:<15}{entry['tokens_per_second']:>10,.0f}{1e3 * statistics.median(entry['step_seconds']):>10,.0f}"
            f"{metrics.percent(entry['matmul_fraction']):>11}{metrics.percent(entry['matmul_fraction_causal']):>10}"
            f"  {ratio:>6}"
        )
    if any(entry["matmul_fraction"] > 1 for entry in found.values()):
        lines.append(ABOVE_MATMUL_RATE)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_train_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(CONFIGS / "125m.json"))
    parser.add_argument("--vocab_size", type=int, default=ASSUMED_VOCAB_SIZE)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--micro_batch", type=int, default=2, help="sequences at once (default %(default)s)")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step (default %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=120, help="measure no longer than this (default %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the result there, as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    options = parser.parse_args(arguments)
    fixed = {
        "model.vocab_size": options.vocab_size,
        "data.seq_len": options.seq_len,
        "train.micro_batch": options.micro_batch,
        "train.global_batch_tokens": options.accumulation * options.micro_batch * options.seq_len,
        "train.precision": options.precision,
        "train.device": "cpu",
        # The rivals' models and loops have no other.
        "model.qk_norm": "false",
        "optimizer.kind": "adamw",
    }
    try:
        config = load_config(options.config, [*options.overrides, *(f"{key}={value}" for key, value in fixed.items())])
        config, _ = follow(config, None)
        result = measure(config, options.contestants, rounds=options.rounds, seconds=options.seconds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result |= {
        "name": Path(options.config).name,
        "command": " ".join(
            ["python -m benchmarks.bench_train_cpu", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "threads": torch.get_num_threads(),
        "capabilities": sorted(
            key for key, has in torch.cpu.get_capabilities().items() if has is True and "bf16" in key
        ),
        "versions": {name: installed_version(name) for name in ("torch", "deepspeed", "transformers")},
    }
    print(table(result))
    if options.output:
        atomic_text(options.output, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
