"""Which backend computes an op, and what is said where the one asked for cannot run."""

import warnings

import pytest
import torch

import kernels
from kernels import cpu, dispatch

X = torch.randn(1, 4, 2, 16)
CALLS = {
    "attention": lambda **k: kernels.attention(X, X, X, **k),
    "rms_norm": lambda **k: kernels.rms_norm(X, torch.ones(16), **k),
    "add_rms_norm": lambda **k: kernels.add_rms_norm(X, X, torch.ones(16), **k),
    "rope": lambda **k: kernels.rope(X, X, *kernels.rope_cos_sin(0, 4, 16, 1e4), **k),
    "norm_rope": lambda **k: kernels.norm_rope(
        X.flatten(2).repeat(1, 1, 2),
        torch.ones(16),
        torch.ones(16),
        *kernels.rope_cos_sin(0, 4, 16, 1e4),
        n_heads=2,
        **k,
    ),
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
@pytest.mark.parametrize(("backend", "expected"), [(None, "cpp"), ("auto", "cpp"), ("cpp", "cpp"), ("torch", "torch")])
def test_auto_is_the_cpp_on_a_cpu(op: str, backend: str | None, expected: str) -> None:
    CALLS[op](backend=backend)
    assert dispatch.resolve(op, CPU, torch.float32, backend) == expected


def test_auto_takes_torch_for_few_queries_and_an_explicit_cpp_computes_them() -> None:
    assert dispatch.resolve("attention", CPU, torch.float32, "auto", slow_in_cpp=True) == "torch"
    assert dispatch.resolve("attention", CPU, torch.float32, "cpp", slow_in_cpp=True) == "cpp"
    q = torch.randn(1, 3, 2, 16)
    auto, cpp, plain = (kernels.attention(q, q, q, backend=backend) for backend in ("auto", "cpp", "torch"))
    assert torch.equal(auto, plain)
    torch.testing.assert_close(cpp, plain)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            lambda **k: kernels.swiglu(X.double(), X.double(), **k),
            "fp32 and bf16, and the tensors are float64",
        ),
        (lambda **k: kernels.rms_norm(X, torch.ones(16, dtype=torch.bfloat16), **k), "several dtypes or devices"),
        (lambda **k: kernels.attention(*[X[..., :8]] * 3, **k), "head dimension 8 is not a multiple of 16"),
    ],
)
def test_calls_that_the_cpp_does_not_support_go_to_torch_with_a_warning_or_raise(call, reason: str) -> None:
    with pytest.raises(dispatch.CannotRun, match=f"backend 'cpp' cannot run here: .*{reason}"):
        call(backend="cpp")
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert torch.equal(call(), call(backend="torch"))


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("way", ["argument", "set_backend", "environment"])
def test_triton_is_never_replaced_silently(op: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "set_backend":
        kernels.set_backend("triton")
    elif way == "environment":
        monkeypatch.setenv("LLM_KERNELS", "triton")
    with pytest.raises(RuntimeError, match=f"kernels.{op}: backend 'triton' cannot run here"):
        CALLS[op](**({"backend": "triton"} if way == "argument" else {}))
    assert kernels.describe(CPU)[op]["backend"] == ("cpp" if way == "argument" else "error")


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
    with pytest.raises(ValueError, match="set_backend: unknown backend 'cuda'; choose from auto, triton, cpp, torch"):
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
        dispatch.capability.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(torch.version, "hip", hip)
        return torch.device("cuda", 0)

    yield pretend
    dispatch.capability.cache_clear()


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
    assert dispatch.resolve("rope", CPU, torch.float32) == "cpp"


@pytest.mark.parametrize(
    ("dtype", "unsupported", "reason"),
    [(torch.float64, None, "compute in fp32, and the tensors are float64"), (torch.float32, "D is odd", "D is odd")],
)
def test_a_call_that_no_kernel_covers_goes_to_torch_and_says_so_once(
    gpu, dtype: torch.dtype, unsupported: str | None, reason: str, recwarn: pytest.WarningsRecorder
) -> None:
    device = gpu((9, 0))
    for _ in range(2):
        assert dispatch.resolve("rope", device, dtype, None, triton=unsupported) == "torch"
    (said,) = recwarn
    assert str(said.message).startswith("kernels.rope: torch computes this one: ")
    assert reason in str(said.message)
    with pytest.raises(RuntimeError, match=f"cannot run here: .*{reason}"):
        dispatch.resolve("rope", device, dtype, "triton", triton=unsupported)


def test_bf16_where_there_is_none_is_an_error_that_names_the_way_out(gpu) -> None:
    device = gpu((7, 5))
    for backend in ("auto", "torch"):
        with pytest.raises(
            RuntimeError, match=r"Some GPU \(compute capability 7.5\) has no bf16; set train.precision=fp16"
        ):
            dispatch.resolve("rope", device, torch.bfloat16, backend)
        assert dispatch.resolve("rope", device, torch.float16, backend) == "torch"


def test_describe_says_who_asked_for_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "C++ computes fp32 and bf16 on a CPU, torch the other dtypes"
    assert kernels.describe(CPU)["rope"] == {"backend": "cpp", "reason": reason}
    for backend in ("torch", "cpp"):
        monkeypatch.setenv("LLM_KERNELS", backend)
        assert kernels.describe(CPU)["rope"] == {"backend": backend, "reason": "LLM_KERNELS asks for it"}
    kernels.set_backend("torch")
    assert kernels.describe(CPU)["rope"] == {"backend": "torch", "reason": "kernels.set_backend asks for it"}
    kernels.set_backend("cpp")
    assert kernels.describe("cuda:0")["rope"] == {
        "backend": "error",
        "reason": "the C++ needs a CPU, and the tensors are on cuda",
    }


def test_without_the_extension_torch_computes_and_describe_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BUILT", False)
    reason = "the C++ is not built: run `make setup`"
    assert kernels.describe(CPU)["rope"] == {"backend": "torch", "reason": reason}
    assert torch.equal(CALLS["swiglu"](), CALLS["swiglu"](backend="torch"))
    with pytest.raises(dispatch.CannotRun, match="is not built: run `make setup`"):
        CALLS["swiglu"](backend="cpp")


def test_the_interpreter_runs_only_for_who_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    assert dispatch.resolve("rope", CPU, torch.float32) == "torch"
    assert dispatch.resolve("rope", CPU, torch.float32, "triton") == "triton"
    assert kernels.describe(CPU)["rope"]["backend"] == "torch"
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 gives the CPU to Triton's interpreter"):
        dispatch.resolve("rope", CPU, torch.float32, "cpp")
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
