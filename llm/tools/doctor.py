"""What this machine has to work with, and whether its kernels compute what they should."""

import math
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels import dispatch, reference
from kernels.parity import Parity, check
from llm.config import Config, ModelConfig, load_config
from llm.errors import UserError
from llm.model.transformer import IGNORE_INDEX, padded_vocab_size
from llm.world import pick_device

PACKAGES = ("torch", "triton", "deepspeed", "numpy")
ASSUMED_VOCAB_SIZE = 32_000
BATCH = 2  # rows of tokens: one of short documents, one of a single document
DOCUMENTS = (1, 63, 64, 65, 400)  # their lengths in tokens, over and over: around a block's edge, and a usual one
LOSS_PERIOD = 5
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# The largest tensor of a twin, in elements: time bounds it, and on a GPU memory, since a twin and its backward hold
# about 16 such tensors in fp32 (twice that, to be safe). CPU_PRODUCTS bounds the LM head's, which a CPU also computes
# in fp64.
GPU_ELEMENTS, CPU_ELEMENTS, INTERPRETER_ELEMENTS = 2**29, 2**22, 2**15
GPU_BYTES_AN_ELEMENT = 128
CPU_PRODUCTS = 2**31

Say = Callable[[str], None]


def describe_machine(say: Say) -> dict[str, Any]:
    """`llm doctor`: what is installed, and what would compute.

    Args:
        say: gets each line for people.

    Returns what `llm doctor --json` prints; its `failed` names what does not work.
    """
    failed: list[str] = []

    def wrong(part: str, text: str) -> None:
        failed.append(part)
        say(f"{part:<11} {text}")

    versions = {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES}
    for package, installed in versions.items():
        say(f"{package:<11} {installed or 'not installed'}")

    try:
        pick_device("auto")
    except UserError as error:
        wrong("device", str(error))
    devices = [_gpu(index) for index in range(torch.cuda.device_count())]
    for gpu in devices:
        memory, bf16 = gpu["memory_bytes"] / 2**30, "has bf16" if gpu["bf16"] else "no bf16"
        say(f"device      {gpu['name']}, capability {gpu['capability']}, {memory:.0f} GiB, {bf16}")
    cpu = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    say(f"device      cpu, {cpu['machine']}, {cpu['cores']} cores, torch uses {cpu['threads']} threads")

    crc32c = None
    try:
        from llm.data import _shards
    except ImportError as error:
        wrong("extension", f"llm.data._shards does not load: {error}; run `make setup`")
    else:
        crc32c = _shards.CRC32C_IMPLEMENTATION
        say(f"extension   llm.data._shards loads, CRC-32C by {crc32c}")

    described: dict[str, dict[str, str]] = {}
    try:
        described = kernels.describe()
    except ValueError as error:
        wrong("kernels", str(error))
    for op in described.values():
        if op["backend"] == "error" and "kernels" not in failed:
            wrong("kernels", f"LLM_KERNELS=triton: {op['reason']}; unset it")
    for backend, reason in dict.fromkeys((op["backend"], op["reason"]) for op in described.values()):
        if backend != "error":
            say(f"kernels     {backend}: {reason}")
    return {
        "versions": versions,
        "devices": devices,
        "cpu": cpu,
        "crc32c": crc32c,
        "kernels": described,
        "failed": failed,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    capability = f"{properties.major}.{properties.minor}"
    return {"name": properties.name, "capability": capability, "memory_bytes": properties.total_memory, "bf16": bf16}


def check_kernels(config_path: str, backend: str | None = None, *, say: Say) -> dict[str, Any]:
    """`llm doctor --kernels`: every op against its twin, forward and backward, by the rule of kernels.parity.

    Args:
        config_path: of the config whose sizes and device to take. A small machine gets fewer rows or heads.
        backend: "triton", "torch" or "auto"; None: what LLM_KERNELS says.
        say: gets each line for people.

    Returns what `llm doctor --kernels --json` prints; its `failed` names the ops that do not agree. Raises UserError
    for a config that cannot be read, and for a device or backend that cannot run here.
    """
    config = load_config(config_path)
    device = pick_device(config.train.device, way_out="train.device=cpu in the config")
    described = _described(device, backend)
    triton = described["attention"]["backend"] == "triton"
    model, seq_len, origin = _resolved(config)
    say(f"device      {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'}")
    say(f"kernels     {described['attention']['backend']}: {described['attention']['reason']}")
    say(f"sizes       {config_path}: vocabulary {model.vocab_size:,}, rows of {seq_len:,} tokens ({origin})")
    say("errors      the largest, against the twin in high precision; torch is naive torch in the same dtype\n")
    say(f"{'':37}{'forward':^19} {'backward':^19}")
    say(f"{'op':<21} {'dtype':<5} {'backend':<8} {'kernel':>9} {'torch':>9} {'kernel':>9} {'torch':>9}  verdict size")
    if device.type == "cuda":
        elements = min(GPU_ELEMENTS, torch.cuda.mem_get_info(device)[0] // GPU_BYTES_AN_ELEMENT)
        low = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    else:
        elements = INTERPRETER_ELEMENTS if triton else CPU_ELEMENTS
        low = torch.float16 if triton else torch.bfloat16  # Triton's interpreter computes bf16 wrongly
    may_change = (backend or dispatch.requested()) != "triton"
    checks = []
    for dtype in (low, torch.float32):
        for case in _cases(model, seq_len, elements, device, dtype):
            found = _check(case, described[case.op]["backend"], may_change=may_change)
            checks.append({"op": case.op, "dtype": DTYPES[dtype], "size": case.size, **found})
            say(_line(checks[-1]))
    failed = [f"{one['op']} in {one['dtype']}" for one in checks if not one["agrees"]]
    say(f"\n{len(checks) - len(failed)} of {len(checks)} agree")
    return {"device": str(device), "checks": checks, "failed": failed}


def _described(device: torch.device, backend: str | None) -> dict[str, dict[str, str]]:
    asked = "LLM_KERNELS=triton" if backend is None else f"--backend {backend}"
    kernels.set_backend(backend)
    try:
        described = kernels.describe(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    finally:
        kernels.set_backend(None)
    for op in described.values():
        if op["backend"] == "error":
            raise UserError(f"{asked}: {op['reason']}; take torch or auto")
    return described


def _resolved(config: Config) -> tuple[ModelConfig, int, str]:
    """The model with a vocabulary, the tokens of a row, and where both are from."""
    from llm.data.manifest import (  # `llm doctor` has to run where the extension does not load
        MANIFEST_NAME,
        read_manifest,
    )

    folder = config.data.path if config.data.sources is None else config.data.sources[0].path
    vocab_size, seq_len, origin = config.model.vocab_size, config.data.seq_len, "the config's"
    if (vocab_size is None or seq_len is None) and (Path(str(folder)) / MANIFEST_NAME).exists():
        manifest = read_manifest(str(folder))
        vocab_size, seq_len = vocab_size or manifest.vocab_size, seq_len or manifest.seq_len
        origin = f"as in {folder}"
    elif vocab_size is None:
        vocab_size, origin = ASSUMED_VOCAB_SIZE, f"a vocabulary assumed, since there is no {folder}/{MANIFEST_NAME}"
    model = config.model.model_copy(update={"vocab_size": vocab_size})
    return model, seq_len or model.max_seq_len, origin


@dataclass(frozen=True)
class _Case:
    """One op at one size: a function of the inputs and of `backend`, and its twin, of the inputs and of `upcast`."""

    op: str
    size: str
    function: Callable[..., Any]
    twin: Callable[..., Any]
    inputs: dict[str, Tensor]
    rows: dict[str, int]  # as kernels.parity.check takes them


def _cases(
    model: ModelConfig, seq_len: int, elements: int, device: torch.device, dtype: torch.dtype
) -> Iterator[_Case]:
    """Every op of the model; no tensor of a twin holds more than `elements`, except where a few rows do."""
    generator = torch.Generator(device).manual_seed(0)
    d, f, head_dim, hq, hkv = model.d_model, model.d_ff, model.head_dim, model.n_heads, model.n_kv_heads
    padded, vocab_size = padded_vocab_size(model), model.vocab_size

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    def fit(wanted: int, most: int, unit: str, least: int = 1) -> tuple[int, str]:
        count = min(wanted, max(least, most))
        return count, f"{count:,} {unit}" if count == wanted else f"{count:,} of {wanted:,} {unit}"

    def bound(function: Callable[..., Any], *last: Any, **options: Any) -> Callable[..., Any]:
        return lambda *inputs, **chosen: function(*inputs, *last, **options, **chosen)

    group = hq // hkv
    kv, heads_said = fit(hkv, elements // (BATCH * group * min(seq_len, 512) ** 2), "KV")
    s, said = fit(seq_len, math.isqrt(elements // (BATCH * group * kv)), "tokens")
    q, k, v = randn(BATCH, s, (group + 2) * kv, head_dim).split((group * kv, kv, kv), dim=2)
    documents = {"doc_start": _doc_start(s, device)}
    yield _Case(
        "attention",
        f"{BATCH} x {said}, heads of {head_dim}, {group} to each of {heads_said}",
        bound(kernels.attention, **documents),
        bound(reference.attention, **documents),
        {"q": q, "k": k, "v": v},
        {"gradient 1": s * group, "gradient 2": s * group},
    )

    n, said = fit(BATCH * seq_len, elements // d, "rows")
    x, residual, weight = randn(n, d), randn(n, d), randn(d)
    for function, twin, inputs in (
        (kernels.rms_norm, reference.rms_norm, {"x": x}),
        (kernels.add_rms_norm, reference.add_rms_norm, {"x": x, "residual": residual}),
    ):
        yield _Case(
            function.__name__,
            f"{said} of {d:,}",
            bound(function, eps=model.norm_eps),
            bound(twin, eps=model.norm_eps),
            {**inputs, "weight": weight},
            {f"gradient {len(inputs)}": n},
        )

    s, said = fit(seq_len, elements // (BATCH * (hq + hkv) * head_dim), "tokens")
    q, k, _ = randn(BATCH, s, hq + 2 * hkv, head_dim).split((hq, hkv, hkv), dim=2)
    tables = kernels.rope_cos_sin(0, s, head_dim, model.rope_theta, device)
    yield _Case(
        "rope",
        f"{BATCH} x {said}, {hq} + {hkv} heads of {head_dim}",
        bound(kernels.rope, *tables),
        bound(reference.rope, *tables),
        {"q": q, "k": k},
        {},
    )

    n, said = fit(BATCH * seq_len, elements // (2 * f), "rows")
    yield _Case("swiglu", f"{said} of 2 x {f:,}", kernels.swiglu, reference.swiglu, {"gate_up": randn(n, 2 * f)}, {})

    n, said = fit(BATCH * seq_len, elements // padded, "rows", LOSS_PERIOD)
    options: dict[str, Any] = {"vocab_size": vocab_size, "ignore_index": IGNORE_INDEX, "reduction": "none"}
    yield _Case(
        "cross_entropy",
        f"{said} of {padded:,}",
        bound(kernels.cross_entropy, _targets(n, model, device), **options),
        bound(reference.cross_entropy, _targets(n, model, device), **options),
        {"logits": randn(n, padded)},
        {},
    )

    if device.type == "cpu":
        n, said = fit(BATCH * seq_len, min(n, CPU_PRODUCTS // (padded * d)), "rows", LOSS_PERIOD)
    options["reduction"] = "sum"  # as the model's loss
    yield _Case(
        "linear_cross_entropy",
        f"{said} of {d:,} by {padded:,}",
        bound(kernels.linear_cross_entropy, _targets(n, model, device), **options),
        bound(reference.linear_cross_entropy, _targets(n, model, device), **options),
        {"x": randn(n, d) / d**0.5, "weight": randn(padded, d)},
        {"output 0": n, "gradient 1": n},
    )


def _doc_start(s: int, device: torch.device) -> Tensor:
    """int32 [BATCH, s]: rows of short documents, but the last one a single document."""
    starts: list[int] = []
    while len(starts) < s:
        for length in DOCUMENTS:
            starts += [len(starts)] * length
    return torch.tensor([starts[:s]] * (BATCH - 1) + [[0] * s], dtype=torch.int32, device=device)


def _targets(n: int, model: ModelConfig, device: torch.device) -> Tensor:
    """int64 [n]: words from all over the vocabulary; of LOSS_PERIOD rows, the last is without loss."""
    target = torch.arange(n, device=device) * 7919 % (model.vocab_size or 1)
    target[LOSS_PERIOD - 1 :: LOSS_PERIOD] = IGNORE_INDEX
    return target


def _check(case: _Case, backend: str, *, may_change: bool) -> dict[str, Any]:
    """What kernels.parity finds, and the backend that computed: torch where Triton does not cover the call, if it may.

    An op that raises does not agree. A number that is not finite is None.
    """
    names = {f"gradient {i}": f"gradient of {name}" for i, name in enumerate(case.inputs)}

    def run(backend: str) -> list[Parity]:
        return check(partial(case.function, backend=backend), case.twin, list(case.inputs.values()), rows=case.rows)

    try:
        try:
            results = run(backend)
        except dispatch.CannotRun:
            if not may_change:
                raise
            backend, results = "torch", run("torch")
    except Exception as error:  # compilers and drivers fail in many ways, and the other ops are still to be checked
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return {"backend": backend, "agrees": False, "error": message, "results": []}
    return {
        "backend": backend,
        "agrees": all(result.agrees for result in results),
        "error": None,
        "results": [
            {
                key: None if isinstance(value, float) and not math.isfinite(value) else names.get(value, value)
                for key, value in asdict(result).items()
            }
            for result in results
        ],
    }


def _line(found: dict[str, Any]) -> str:
    begin = f"{found['op']:<21} {found['dtype']:<5} {found['backend']:<8} "
    if found["error"] is not None:
        return f"{begin} WRONG   {found['size']}: {found['error']}"

    def largest(kind: str, key: str) -> float:
        values = [result[key] for result in found["results"] if result["name"].startswith(kind)]
        return math.nan if None in values else max(values)

    errors = [largest(kind, key) for kind in ("output", "gradient") for key in ("error", "torch_error")]
    wrong = ", ".join(result["name"] for result in found["results"] if not result["agrees"])
    verdict = f"WRONG   {found['size']}: {wrong}" if wrong else f"agrees  {found['size']}"
    return begin + " ".join(f"{error:9.2e}" for error in errors) + f"  {verdict}"
