"""`llm doctor`: checks this machine, or those of a launcher, and whether the kernels compute the right results."""

import importlib
import math
import os
import platform
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels import dispatch, reference
from kernels.dispatch import cpu_has_bf16
from kernels.parity import Parity, check
from llm import launchers
from llm.config import CheckpointConfig, Config, DataConfig, ModelConfig
from llm.config_file import load_config
from llm.errors import ReportedByRank0, UserError
from llm.model.transformer import IGNORE_INDEX, padded_vocab_size
from llm.rendezvous import leave_group, meet
from llm.tools.doctor_bits import bits_of, compare_bits, of_all, product_bits
from llm.tools.doctor_folders import check_checkpoints, check_data, check_shared, data_hash, ranks_in_words
from llm.tools.doctor_node import Finding, check_gpu, check_limits, check_memory, judge_rates, measure_rates
from llm.tools.doctor_ranks import Rank, Ranks, compare, judge_pairs, matrix, network_peak, table
from llm.world import PRECISIONS, join, pick_device

PACKAGES = ("torch", "triton", "deepspeed", "numpy")
BATCH = 2  # sequences of tokens: one of short documents, one of a single document
DOCUMENTS = (1, 63, 64, 65, 400)  # document lengths in tokens, repeated: around the edge of a block, and a usual one
LOSS_PERIOD = 5

# Limits of a reference computation: elements of its largest tensor, for its time and for GPU memory (forward and
# backward of the reference need about 16 such tensors in fp32; the limit leaves room for twice that). CPU_PRODUCTS
# limits the multiplications of the LM head, which a CPU computes in fp64 too.
GPU_ELEMENTS, CPU_ELEMENTS, INTERPRETER_ELEMENTS = 2**29, 2**22, 2**15
GPU_BYTES_AN_ELEMENT = 128
CPU_PRODUCTS = 2**31

Say = Callable[[str], None]


def describe_machine(config_path: str | None = None, seconds: float = 10.0, *, say: Say) -> dict[str, Any]:
    """`llm doctor`: what this machine has, what is wrong with it, and how to mend it.

    Under a launcher every rank checks its machine; then the ranks are compared, and their connections measured.

    Args:
        config_path: the config whose folders, device and checkpoints are checked; None: the defaults of the keys.
        seconds: how long the device computes, so that heat shows.
        say: called with each line to show.

    Returns what `llm doctor --json` prints; `failed` lists what stops or falsifies training here. Raises UserError for
    a config that cannot be read, and ReportedByRank0 on the other ranks if something failed.
    """
    config = None if config_path is None else load_config(config_path)
    place = meet()
    found: list[Finding] = []

    # At once, because the checks take a while. Continues after a failure, so that one call shows all problems.
    def note(findings: Iterable[Finding]) -> None:
        for finding in findings:
            found.append(finding)
            if place.rank == 0:
                for line in finding.lines():
                    say(line)

    # From the packages' metadata, because a package that cannot be imported has a version too.
    versions = {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES}
    note(Finding(package, installed or "not installed") for package, installed in versions.items())
    wanted = "auto" if config is None else config.train.device
    try:
        device = pick_device(wanted, place.local_rank, "train.device=cpu")
    except UserError as error:
        note([Finding("device", str(error), "wrong")])
        device = torch.device("cpu")
    devices = [_gpu(index) for index in range(torch.cuda.device_count())]
    for gpu in devices:
        memory, bf16 = gpu["memory_bytes"] / 2**30, "has bf16" if gpu["bf16"] else "no bf16"
        note([Finding("device", f"{gpu['name']}, capability {gpu['capability']}, {memory:.0f} GiB, {bf16}")])
    cpu = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    text = f"cpu, {cpu['machine']}, {cpu['cores']} cores, torch uses {cpu['threads']} threads"
    note([Finding("device", text), *check_gpu(device)])
    crc32c, extensions = _extensions()
    note(extensions)
    described, chosen = _backends(device)
    note(chosen)
    note(check_limits(place.size))
    measured, findings = check_memory()
    note(findings)
    checkpoints, data = _folders(config)
    rates, findings = check_checkpoints(checkpoints, None if config is None else _checkpoint_bytes(config))
    measured |= rates
    note(findings)
    for folder in data:
        rates, findings = check_data(folder)
        measured |= rates
        note(findings)
    # Formed before the rates are measured, so that all ranks compute at the same time.
    ranks = Ranks(place, device) if place.size > 1 else None
    if ranks is not None:
        ranks.wait()
    speed = measure_rates(device, _dtype(device), seconds)
    measured |= {"matmul": speed.matmul_flops, "copy": speed.copy_bytes, "cooled": speed.cooled}
    note(judge_rates(speed, device, seconds))
    result: dict[str, Any] = {
        "versions": versions,
        "devices": devices,
        "cpu": cpu,
        "crc32c": crc32c,
        "kernels": described,
        "measured": measured,
    }
    if ranks is not None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        hashes = [data_hash(folder) for folder in data]
        own = Rank(device=name, versions=versions, data=hashes, measured=measured, findings=found)
        compared = _compare_ranks(ranks, own, checkpoints, say)
        found = compared.pop("findings")
        result |= compared
    failed = list(dict.fromkeys(one.part for one in found if one.level == "wrong"))
    warnings = list(dict.fromkeys(one.part for one in found if one.level == "warning"))
    if place.rank > 0 and failed:
        raise ReportedByRank0("rank 0 prints why")
    if place.rank == 0:
        wrong = f"wrong: {', '.join(failed)}" if failed else "nothing is wrong"
        say(f"\n{wrong}" + (f"; warnings: {', '.join(warnings)}" if warnings else ""))
    return result | {"findings": [asdict(one) for one in found], "warnings": warnings, "failed": failed}


def _compare_ranks(ranks: Ranks, own: Rank, checkpoints: str, say: Say) -> dict[str, Any]:
    """Measures between the ranks, shows one table of all, and returns what `describe_machine` adds to its result."""
    own.measured["clock"] = ranks.clock_offset(time.time)
    if (network := network_peak()) is not None:
        own.measured["network"] = network
    shared = check_shared(checkpoints, ranks.rank, ranks.size, ranks.gather)
    rates = {backend: (ranks.all_reduce(backend), ranks.pairs(backend)) for backend in ranks.backends}
    every: list[Rank] = ranks.gather(own)
    findings = [*shared, *compare(every)]
    for backend, ((small, sent), pairs) in rates.items():
        text = f"{1e6 * small:,.0f} us for a small one; each rank sends {sent / 1e9:.3g} GB/s in a large one"
        findings += [Finding("network", f"{backend} all-reduce: {text}"), *judge_pairs(pairs, every, backend)]
    foreign = {  # what rank 0 does not have itself
        finding: [n for n, rank in enumerate(every) if finding in rank.findings]
        for rank in every[1:]
        for finding in rank.findings
        if finding.level != "fine" and finding not in every[0].findings
    }
    if ranks.rank == 0:
        for finding, whose in foreign.items():
            for line in finding.lines(f"{ranks_in_words(whose)}: "):
                say(line)
        for finding in findings:
            for line in finding.lines():
                say(line)
        for line in ("", *table(every)):
            say(line)
        for backend, (_, pairs) in rates.items():
            for line in ("", *matrix(pairs, ranks.size, backend)):
                say(line)
    return {
        "findings": [*every[0].findings, *foreign, *findings],
        "ranks": [{"host": rank.host, "device": rank.device, "measured": rank.measured} for rank in every],
        "network": {
            backend: {
                "all_reduce": {"small_seconds": small, "bytes_per_second": sent},
                "pairs": [
                    {"ranks": pair, "small_seconds": seconds, "bytes_per_second": rate}
                    for pair, (seconds, rate) in pairs.items()
                ],
            }
            for backend, ((small, sent), pairs) in rates.items()
        },
    }


def _extensions() -> tuple[str | None, list[Finding]]:
    """Imports the C++ extensions; returns the implementation of CRC-32C, and what was found."""
    crc32c, findings = None, []
    for name in ("llm.data._shards", "llm.data._encoder", "llm.inference._decoder"):
        try:
            extension = importlib.import_module(name)
        except ImportError as error:
            findings.append(Finding("extension", f"{name} does not load: {error}", "wrong", "make setup"))
            continue
        crc32c = getattr(extension, "CRC32C_IMPLEMENTATION", crc32c)
        text = f"{name} loads" + (f", CRC-32C by {crc32c}" if name == "llm.data._shards" else "")
        findings.append(Finding("extension", text))
    return crc32c, findings


def _backends(device: torch.device) -> tuple[dict[str, dict[str, str]], list[Finding]]:
    """Returns kernels.describe(), and the backend of the ops in words."""
    try:
        described = kernels.describe(device)
    except ValueError as error:
        return {}, [Finding("kernels", str(error), "wrong")]
    findings = []
    # Most ops have the same backend and reason, so each pair is shown once. A dict, unlike a set, keeps the order.
    for backend, reason in dict.fromkeys((op["backend"], op["reason"]) for op in described.values()):
        if backend == "error":
            # One line: the same reason holds for the other ops.
            text = f"LLM_KERNELS={dispatch.requested()}: {reason}"
            return described, [Finding("kernels", text, "wrong", "unset LLM_KERNELS")]
        findings.append(Finding("kernels", f"{backend}: {reason}"))
    return described, findings


def _folders(config: Config | None) -> tuple[str, list[str]]:
    """Returns the folder of checkpoints and those of data."""
    checkpoint, data = (CheckpointConfig(), DataConfig()) if config is None else (config.checkpoint, config.data)
    return checkpoint.dir, list(dict.fromkeys(data.paths))


def _checkpoint_bytes(config: Config) -> int:
    """Returns the bytes of all the checkpoints that a run has at the same time."""
    from llm.tools.plan_step import kept_bytes
    from llm.training.resolve import find_data, resolve

    return kept_bytes(resolve(config, find_data(config.data))[0])


def _dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype whose products are measured: that of training, as far as the device alone decides it."""
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bf16() else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        # By default torch also counts bf16 that it emulates.
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    capability = f"{properties.major}.{properties.minor}"
    return {"name": properties.name, "capability": capability, "memory_bytes": properties.total_memory, "bf16": bf16}


def check_kernels(config_path: str, backend: str | None = None, *, say: Say) -> dict[str, Any]:
    """`llm doctor --kernels`: compares every op with its reference, forward and backward, by kernels.parity.

    Args:
        config_path: the config with the sizes and the device. On a small machine there are fewer sequences or heads.
        backend: one of kernels.dispatch.CHOICES; None: the value of LLM_KERNELS. "auto" checks the backend that it
            chooses and every other one that runs on the device.
        say: called with each line to show.

    Returns what `llm doctor --kernels --json` prints; `failed` lists the ops that do not agree. Raises UserError
    for a config that cannot be read, and for a device or backend that cannot run here.

    Under a launcher every rank does this, with the same inputs, and rank 0 also says whose results have other bits.
    """
    config = load_config(config_path)
    world = None
    if launchers.world_size() == 1:
        device = pick_device(config.train.device, way_out="train.device=cpu in the config")
    else:
        world = join(config.train.device, torch.float32)
        device = world.device
        if world.rank > 0:
            say = _nothing
    described = _described(device, backend)
    triton = described["attention"]["backend"] == "triton"
    model, seq_len, origin = _resolved(config)
    say(f"device      {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'}")
    say(f"kernels     {described['attention']['backend']}: {described['attention']['reason']}")
    say(f"sizes       {config_path}: vocabulary {model.vocab_size:,}, sequences of {seq_len:,} tokens ({origin})")
    say("errors      the largest, against the reference in high precision;")
    say("            torch is naive torch in the same dtype\n")
    say(f"{'':34}{'forward':^17}{'backward':^17}")
    say(f"{'op':<20} {'dtype':<5} {'backend':<7}" + 2 * f" {'kernel':>7} {'torch':>7} " + " verdict")
    if device.type == "cuda":
        elements = min(GPU_ELEMENTS, torch.cuda.mem_get_info(device)[0] // GPU_BYTES_AN_ELEMENT)
        low = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    else:
        elements = INTERPRETER_ELEMENTS if triton else CPU_ELEMENTS
        low = torch.float16 if triton else torch.bfloat16  # Triton's interpreter computes bf16 wrongly
    if world is not None:
        elements = min(of_all(world, elements))  # else ranks with less free memory would have other inputs
    auto = (backend or dispatch.requested()) == "auto"
    backends = [described, *(_others(device, described) if auto else [])]
    checks = []
    for dtype in (low, torch.float32):
        for case in _cases(model, seq_len, elements, device, dtype):
            for chosen in backends:
                found = _check(case, chosen[case.op]["backend"], may_change=auto)
                checks.append({"op": case.op, "dtype": PRECISIONS[dtype], "size": case.size, **found})
                say(_line(checks[-1]))
    say("")
    for op, size in {one["op"]: one["size"] for one in checks}.items():  # the same in every dtype
        say(textwrap.fill(f"{op:<21}{size}", 80, subsequent_indent=" " * 21))
    failed = list(dict.fromkeys(f"{one['op']} in {one['dtype']}" for one in checks if not one["agrees"]))
    say(f"\n{len(checks) - len(failed)} of {len(checks)} agree")
    result = {"device": str(device), "checks": checks, "failed": failed}
    if world is None:
        return result
    ranks = of_all(world, (bits_of(checks) | product_bits(device, low, model.d_model), failed))
    world.barrier()
    leave_group()
    return {} if world.rank else result | compare_bits(ranks, say)


def _nothing(text: str) -> None:
    """Shows nothing: rank 0 does."""


def _described(device: torch.device, backend: str | None) -> dict[str, dict[str, str]]:
    kernels.set_backend(backend)
    try:
        described = kernels.describe(device)
        asked = f"LLM_KERNELS={dispatch.requested()}" if backend is None else f"--backend {backend}"
    except ValueError as error:
        raise UserError(str(error)) from None
    # The choice is global, and the ops below are called with an explicit backend.
    finally:
        kernels.set_backend(None)
    for op in described.values():
        if op["backend"] == "error":
            raise UserError(f"{asked}: {op['reason']}; take torch or auto")
    return described


def _others(device: torch.device, described: dict[str, dict[str, str]]) -> Iterator[dict[str, dict[str, str]]]:
    """Describes the other backends that run here. All are compared with one reference, hence with each other."""
    for backend in dispatch.CHOICES:
        if backend not in ("auto", described["attention"]["backend"]):
            try:
                yield _described(device, backend)
            except UserError:  # it needs another device
                continue


def _resolved(config: Config) -> tuple[ModelConfig, int, str]:
    """The model with a vocabulary, the tokens of a sequence, and where both are from."""
    # Here, because `llm doctor` has to run where the extension does not load.
    from llm.training.resolve import find_data, missing_data, resolve

    data = find_data(config.data)
    resolved, _ = resolve(config, data)
    assert resolved.data.seq_len is not None
    if data is not None:
        origin = f"as in {data.name}"
    elif config.model.vocab_size is None:
        origin = f"a vocabulary assumed, since there is no {missing_data(config.data)}/manifest.json"
    else:
        origin = "the config's"
    return resolved.model, resolved.data.seq_len, origin


@dataclass(frozen=True)
class _Case:
    """One call of an op."""

    op: str
    size: str
    inputs: dict[str, Tensor]  # {argument: tensor}; their gradients are compared too
    options: dict[str, Any]  # the other arguments
    rows: dict[str, int]  # see kernels.parity.check


def _cases(
    model: ModelConfig, seq_len: int, elements: int, device: torch.device, dtype: torch.dtype
) -> Iterator[_Case]:
    """Yields every op of the model. Tensors of a reference have at most `elements`, unless a few rows have more."""
    # The same numbers in every call, so that machines and versions can be compared.
    generator = torch.Generator(device).manual_seed(0)
    d, f, head_dim, hq, hkv = model.d_model, model.d_ff, model.head_size, model.n_heads, model.n_kv_heads
    padded, vocab_size = padded_vocab_size(model), model.vocab_size

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    def fit(wanted: int, most: int, unit: str, least: int = 1) -> tuple[int, str]:
        count = min(wanted, max(least, most))
        return count, f"{count:,} {unit}" if count == wanted else f"{count:,} of {wanted:,} {unit}"

    group = hq // hkv
    # Heads are left out only if 512 tokens of all heads do not fit; after that the sequences get shorter.
    kv, kv_heads = fit(hkv, elements // (BATCH * group * min(seq_len, 512) ** 2), "KV")
    s, size = fit(seq_len, math.isqrt(elements // (BATCH * group * kv)), "tokens")
    # q, k and v are slices of one projection, as in the model.
    q, k, v = randn(BATCH, s, (group + 2) * kv, head_dim).split((group * kv, kv, kv), dim=2)
    yield _Case(
        "attention",
        f"{BATCH} x {size}, heads of {head_dim}, {group} to each of {kv_heads}",
        {"q": q, "k": k, "v": v},
        {"doc_start": _doc_start(s, device)},
        {"gradient 1": s * group, "gradient 2": s * group},
    )

    n, size = fit(BATCH * seq_len, elements // d, "rows")
    x, residual, weight = randn(n, d), randn(n, d), randn(d)
    eps = {"eps": model.norm_eps}
    yield _Case("rms_norm", f"{size} of {d:,}", {"x": x, "weight": weight}, eps, {"gradient 1": n})
    inputs = {"x": x, "residual": residual, "weight": weight}
    yield _Case("add_rms_norm", f"{size} of {d:,}", inputs, eps, {"gradient 2": n})

    s, size = fit(seq_len, elements // (BATCH * (hq + hkv) * head_dim), "tokens")
    q, k, _ = randn(BATCH, s, hq + 2 * hkv, head_dim).split((hq, hkv, hkv), dim=2)
    # Angles are options and not inputs: no gradient flows into them.
    cos, sin = kernels.rope_cos_sin(0, s, head_dim, model.rope_theta, device)
    size = f"{BATCH} x {size}, {hq} + {hkv} heads of {head_dim}"
    yield _Case("rope", size, {"q": q, "k": k}, {"cos": cos, "sin": sin}, {})

    qkv, weights = randn(BATCH, s, (hq + 2 * hkv) * head_dim), (randn(head_dim), randn(head_dim))
    inputs = {"qkv": qkv, "q_weight": weights[0], "k_weight": weights[1]}
    options = {"cos": cos, "sin": sin, "n_heads": hq, **eps}
    summed = {"gradient 1": BATCH * s * hq, "gradient 2": BATCH * s * hkv}
    yield _Case("norm_rope", f"{BATCH} x {s:,} tokens, {hq} + {hkv} heads of {head_dim}", inputs, options, summed)

    n, size = fit(BATCH * seq_len, elements // (2 * f), "rows")
    yield _Case("swiglu", f"{size} of 2 x {f:,}", {"gate_up": randn(n, 2 * f)}, {}, {})

    options = {"vocab_size": vocab_size, "ignore_index": IGNORE_INDEX}
    # At least one period, so that one row has no label.
    n, size = fit(BATCH * seq_len, elements // padded, "rows", LOSS_PERIOD)
    each = {**options, "target": _targets(n, model, device), "reduction": "none"}
    yield _Case("cross_entropy", f"{size} of {padded:,}", {"logits": randn(n, padded)}, each, {})

    if device.type == "cpu":
        n, size = fit(BATCH * seq_len, min(n, CPU_PRODUCTS // (padded * d)), "rows", LOSS_PERIOD)
    total = {**options, "target": _targets(n, model, device), "reduction": "sum"}  # as the model's loss
    yield _Case(
        "linear_cross_entropy",
        f"{size} of {d:,} by {padded:,}",
        # Logits with a variance of about 1, so that softmax is neither flat nor all on one token.
        {"x": randn(n, d) / d**0.5, "weight": randn(padded, d)},
        total,
        {"output 0": n, "gradient 1": n},
    )


def _doc_start(s: int, device: torch.device) -> Tensor:
    """Returns int32 [BATCH, s]: sequences of short documents; the last sequence is a single document."""
    starts: list[int] = []
    while len(starts) < s:
        for length in DOCUMENTS:
            starts += [len(starts)] * length
    return torch.tensor([starts[:s]] * (BATCH - 1) + [[0] * s], dtype=torch.int32, device=device)


def _targets(n: int, model: ModelConfig, device: torch.device) -> Tensor:
    """Returns int64 [n]: tokens from the whole vocabulary; the last of each LOSS_PERIOD rows is ignored."""
    # A prime step spreads even a few rows over the whole vocabulary.
    target = torch.arange(n, device=device) * 7919 % (model.vocab_size or 1)
    target[LOSS_PERIOD - 1 :: LOSS_PERIOD] = IGNORE_INDEX
    return target


def _check(case: _Case, backend: str, *, may_change: bool) -> dict[str, Any]:
    """Returns the results of kernels.parity and the backend that computed (if allowed, torch for a call that `backend`
    does not support).

    An op that raises does not agree. A number that is not finite becomes None.
    """
    names = {f"gradient {i}": f"gradient of {name}" for i, name in enumerate(case.inputs)}

    def run(backend: str) -> list[Parity]:
        op = partial(getattr(kernels, case.op), backend=backend, **case.options)
        expected = partial(getattr(reference, case.op), **case.options)
        return check(op, expected, list(case.inputs.values()), rows=case.rows)

    try:
        try:
            results = run(backend)
        except dispatch.CannotRun:
            if not may_change:
                raise
            backend, results = "torch", run("torch")
    except Exception as error:  # compilers and drivers fail in many ways, and the other ops must still be checked
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return {"backend": backend, "agrees": False, "error": message, "results": []}
    return {
        "backend": backend,
        "agrees": all(result.agrees for result in results),
        "error": None,
        "results": [
            {
                # JSON has no NaN and no infinity.
                key: None if isinstance(value, float) and not math.isfinite(value) else names.get(value, value)
                for key, value in asdict(result).items()
            }
            for result in results
        ],
    }


def _line(found: dict[str, Any]) -> str:
    """Returns a line of the table; what is wrong is on a line of its own below."""
    begin = f"{found['op']:<20} {found['dtype']:<5} {found['backend']:<7} "
    if found["error"] is not None:
        return f"{begin}{'WRONG':>41}\n    {found['error']}"

    def largest(kind: str, key: str) -> float:
        values = [result[key] for result in found["results"] if result["name"].startswith(kind)]
        # None was not finite and counts as the largest error; max() cannot compare it.
        return math.nan if None in values else max(values)

    errors = [largest(kind, key) for kind in ("output", "gradient") for key in ("error", "torch_error")]
    wrong = ", ".join(result["name"] for result in found["results"] if not result["agrees"])
    numbers = "{:7.1e} {:7.1e}  {:7.1e} {:7.1e}".format(*errors)
    return f"{begin}{numbers}  " + (f"WRONG\n    {wrong}" if wrong else "agrees")
