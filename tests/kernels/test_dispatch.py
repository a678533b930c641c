"""Who computes an op, and what is said where the one asked for cannot."""

import pytest
import torch

import kernels
from kernels import dispatch

X = torch.randn(1, 4, 2, 16)
CALLS = {
    "attention": lambda **k: kernels.attention(X, X, X, **k),
    "rms_norm": lambda **k: kernels.rms_norm(X, torch.ones(16), **k),
    "add_rms_norm": lambda **k: kernels.add_rms_norm(X, X, torch.ones(16), **k),
    "rope": lambda **k: kernels.rope(X, X, *kernels.rope_cos_sin(0, 4, 16, 1e4), **k),
    "swiglu": lambda **k: kernels.swiglu(X, X, **k),
    "cross_entropy": lambda **k: kernels.cross_entropy(X[0, 0], torch.tensor([0, 1]), **k),
    "linear_cross_entropy": lambda **k: kernels.linear_cross_entropy(
        X[0, 0], torch.randn(5, 16), torch.tensor([0, 1]), **k
    ),
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _undisturbed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LLM_KERNELS", raising=False)
    kernels.set_backend(None)
    yield
    kernels.set_backend(None)


def test_every_public_op_is_dispatched() -> None:
    assert set(CALLS) == set(dispatch.OPS) == set(kernels.describe(CPU))


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("backend", [None, "auto", "torch"])
def test_torch_computes_on_a_cpu(op: str, backend: str | None) -> None:
    CALLS[op](backend=backend)
    assert dispatch.resolve(op, CPU, torch.float32, backend) == "torch"


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("way", ["argument", "set_backend", "environment"])
def test_triton_is_never_replaced_silently(op: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "set_backend":
        kernels.set_backend("triton")
    elif way == "environment":
        monkeypatch.setenv("LLM_KERNELS", "triton")
    with pytest.raises(RuntimeError, match=f"kernels.{op}: backend 'triton' cannot run here"):
        CALLS[op](**({"backend": "triton"} if way == "argument" else {}))
    assert kernels.describe(CPU)[op]["backend"] == ("torch" if way == "argument" else "error")


def test_argument_goes_before_set_backend_goes_before_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_KERNELS", "triton")
    assert dispatch.requested() == "triton"
    kernels.set_backend("torch")
    assert dispatch.requested() == "torch"
    kernels.set_backend("triton")
    CALLS["swiglu"](backend="torch")
    kernels.set_backend(None)
    assert dispatch.requested() == "triton"


def test_an_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="set_backend: unknown backend 'cuda'; choose from auto, triton, torch"):
        kernels.set_backend("cuda")
    with pytest.raises(ValueError, match=r"kernels\.rope: unknown backend 'flash'"):
        CALLS["rope"](backend="flash")
    monkeypatch.setenv("LLM_KERNELS", "Torch")
    with pytest.raises(ValueError, match="LLM_KERNELS: unknown backend 'Torch'"):
        CALLS["rope"]()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Makes torch speak of an NVIDIA device, or of an AMD one."""

    def pretend(capability: tuple[int, int], hip: str | None = None) -> torch.device:
        dispatch._capability.cache_clear()
        dispatch._warned.clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(torch.version, "hip", hip)
        return torch.device("cuda", 0)

    yield pretend
    dispatch._capability.cache_clear()


@pytest.mark.parametrize(
    ("capability", "hip", "backend", "reason"),
    [
        ((9, 0), None, "triton", "Some GPU"),
        ((8, 0), None, "triton", "Some GPU"),
        ((7, 5), None, "torch", "capability 8.0, and Some GPU has 7.5"),
        ((9, 4), "6.0", "torch", "NVIDIA"),
    ],
)
def test_auto_is_triton_on_a_capable_nvidia_device(
    gpu, capability: tuple[int, int], hip: str | None, backend: str, reason: str
) -> None:
    device = gpu(capability, hip)
    assert dispatch.resolve("rope", device, torch.float16) == backend
    said = kernels.describe("cuda")["rope"]
    assert said["backend"] == backend
    assert reason in said["reason"]
    assert dispatch.resolve("rope", CPU, torch.float16) == "torch"


@pytest.mark.parametrize(
    ("dtype", "unsupported", "reason"),
    [(torch.float64, None, "compute in fp32, and the tensors are float64"), (torch.float32, "D is odd", "D is odd")],
)
def test_a_call_that_no_kernel_covers_goes_to_torch_and_says_so_once(
    gpu, dtype: torch.dtype, unsupported: str | None, reason: str, recwarn: pytest.WarningsRecorder
) -> None:
    device = gpu((9, 0))
    for _ in range(2):
        assert dispatch.resolve("rope", device, dtype, None, unsupported) == "torch"
    (said,) = recwarn
    assert str(said.message).startswith("kernels.rope: torch computes this one: ")
    assert reason in str(said.message)
    with pytest.raises(RuntimeError, match=f"cannot run here: .*{reason}"):
        dispatch.resolve("rope", device, dtype, "triton", unsupported)


def test_bf16_where_there_is_none_is_an_error_that_names_the_way_out(gpu) -> None:
    device = gpu((7, 5))
    for backend in ("auto", "torch"):
        with pytest.raises(
            RuntimeError, match=r"Some GPU \(compute capability 7.5\) has no bf16; set train.precision=fp16"
        ):
            dispatch.resolve("rope", device, torch.bfloat16, backend)
        assert dispatch.resolve("rope", device, torch.float16, backend) == "torch"


def test_describe_says_who_asked_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "Triton needs an NVIDIA device, and the tensors are on cpu; in fp32 and bf16 C++ computes"
    assert kernels.describe(CPU)["rope"]["reason"] == reason
    monkeypatch.setenv("LLM_KERNELS", "torch")
    assert kernels.describe(CPU)["rope"]["reason"] == "LLM_KERNELS asks for it"
    kernels.set_backend("torch")
    assert kernels.describe(CPU)["rope"]["reason"] == "kernels.set_backend asks for it"


def test_the_interpreter_runs_only_for_who_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    assert dispatch.resolve("rope", CPU, torch.float32) == "torch"
    assert dispatch.resolve("rope", CPU, torch.float32, "triton") == "triton"
    assert kernels.describe(CPU)["rope"]["backend"] == "torch"
    monkeypatch.setenv("LLM_KERNELS", "triton")
    assert kernels.describe(CPU)["rope"]["backend"] == "triton"
    with pytest.raises(RuntimeError, match="computes bf16 wrongly; take fp32 or fp16"):
        dispatch.resolve("rope", CPU, torch.bfloat16, "triton")


@pytest.mark.parametrize("op", CALLS)
def test_ops_compile_into_one_graph(op: str) -> None:
    torch._dynamo.reset()
    expected = CALLS[op]() if op != "linear_cross_entropy" else None
    compiled = torch.compile(CALLS[op], fullgraph=True, backend="eager")()
    if expected is not None:
        torch.testing.assert_close(compiled, expected)
