"""Compiles every shipped kernel without a GPU and shows what decides its speed.

    python -m benchmarks.aot [--architecture sm_90] [--op attention] [--write]

prints registers, spills, shared memory, matrix instructions and the width of memory accesses, and compares them with
the file of this version of Triton in benchmarks/results/aot/, which --write replaces. Ops run on tensors without
storage (meta) with a driver that only compiles, so that each kernel is specialised as in a real call, with every row of
its tile table. The binary is read with Triton's cuobjdump. It is an error if no call uses a row, or if a call of an op
does not compile one of its kernels.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import kernels
from kernels import launch as launching
from kernels.cross_entropy import Options, cross_entropy_in_place

# Another version of the compiler makes other binaries.
GOLDEN = Path(__file__).parent / "results" / "aot" / f"{triton.__version__}.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}  # KiB per program
REGISTER_FILE = 65536  # 32-bit registers per multiprocessor, the limit of one program
PROCESSORS = 132

Call = tuple[int, int, int]
"""(bytes per element, width, size): the tiles of a call depend on these."""


class Incomplete(Exception):
    """The compiled kernels and the tile tables do not match."""


@dataclass(frozen=True)
class Binary:
    """One compiled kernel: the properties that decide its speed."""

    kernel: str
    tile: str  # the constexpr values, num_warps and num_stages
    dtype: str
    registers: int  # per thread
    spilled: int  # bytes of stack a thread, and loads and stores to it
    shared: int  # bytes per program
    warps: int
    matrix: dict[str, int] = field(default_factory=dict)  # {matrix instruction: count}
    loads: dict[str, int] = field(default_factory=dict)  # {bits: loads from global memory}
    stores: dict[str, int] = field(default_factory=dict)
    number: int = 1  # among those that only Triton's own specialising (a multiple of 16, a 1) tells apart

    @property
    def name(self) -> str:
        return f"{self.kernel}[{self.dtype} {self.tile}]" + (f" {self.number}" if self.number > 1 else "")

    def facts(self) -> dict[str, Any]:
        """Its entry in the golden file."""
        return {key: value for key, value in asdict(self).items() if key not in ("kernel", "tile", "dtype", "number")}

    def faults(self, architecture: str) -> list[str]:
        """Reasons not to ship it."""
        limit = SHARED_LIMIT[architecture] * 1024
        return [
            text
            for wrong, text in (
                (self.spilled > 0, f"spills {self.spilled} bytes"),
                (self.shared > limit, f"needs {self.shared} bytes of shared memory of {limit}"),
                (self.registers * self.warps * 32 > REGISTER_FILE, f"needs {self.registers} registers a thread"),
            )
            if wrong
        ]


class _CompilingDriver:
    """The part of a driver that Triton needs to compile."""

    def __init__(self, architecture: str) -> None:
        self.capability = int(architecture.removeprefix("sm_"))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    """One launch that was compiled instead of run."""

    kernel: str  # "OP.NAME", whose tile it took
    call: Call  # for which it took that tile
    binary: Any  # Triton's compiled kernel: the same object for launches with equal specialisation
    meta: dict[str, Any]  # constexpr values, num_warps and num_stages; None for an absent argument
    dtype: str  # dtype of the input


@contextmanager
def compiling(architecture: str) -> Iterator[list[Launch]]:
    """Inside this block, launches compile for the architecture and do not run. Yields the list of these launches."""
    if launching.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels were decorated for the interpreter and cannot be compiled")
    compiled: list[Launch] = []
    taken: list[tuple[str, Call]] = []  # the tile of the next launch

    def take(kernel: str, x: Tensor, width: int, size: int) -> launching.Tile:
        taken.append((kernel, (x.element_size(), width, size)))
        return launching.tile(kernel, x, width, size)

    def compile_only(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        dtypes = [x.dtype for x in args if isinstance(x, Tensor) and x.dtype.is_floating_point]
        dtype = min(dtypes, key=lambda dtype: dtype.itemsize)
        binary = kernel.warmup(*args, grid=grid, enable_fp_fusion=True, **meta)
        absent = {name: None for name, x in zip(kernel.arg_names, args, strict=False) if x is None}
        compiled.append(Launch(*taken.pop(), binary, meta | absent, str(dtype).removeprefix("torch.")))

    with ExitStack() as stack:
        replaced = {"launch": compile_only, "tile": take, "processors": lambda device: PROCESSORS}
        for module in list(sys.modules.values()):
            if module is not launching and getattr(module, "__name__", "").startswith("kernels."):
                for name in replaced.keys() & vars(module).keys():
                    stack.enter_context(mock.patch.object(module, name, replaced[name]))
        stack.enter_context(mock.patch.object(launching, "architecture", return_value=architecture))
        stack.enter_context(launching.launch_on_meta())
        before = driver._active
        driver.set_active(_CompilingDriver(architecture))
        try:
            yield compiled
        finally:
            driver._active = before


def read(compiled: Any, meta: dict[str, Any], dtype: str) -> Binary:
    """Reads a compiled kernel's binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run(
                [str(CUOBJDUMP), option, file.name], capture_output=True, text=True, check=True
            ).stdout

        usage, sass = dump("-res-usage"), dump("-sass")
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    instructions = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass, re.MULTILINE))
    spills = sum(n for name, n in instructions.items() if name.split(".")[0] in ("LDL", "STL"))
    return Binary(
        kernel=compiled.metadata.name,
        tile=" ".join(f"{key}={value}" for key, value in sorted(meta.items())),
        dtype=dtype,
        registers=registers,
        spilled=stack + 4 * spills,
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        matrix=_by(instructions, lambda name: name.split(".")[0] if "MMA" in name.split(".")[0] else None),
        loads=_by(instructions, lambda name: _bits(name) if name.startswith(("LDG", "LDGSTS")) else None),
        stores=_by(instructions, lambda name: _bits(name) if name.startswith("STG") else None),
    )


def _by(instructions: Counter[str], key: Callable[[str], str | None]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for name, count in instructions.items():
        if (k := key(name)) is not None:
            found[k] += count
    return dict(sorted(found.items()))


def _bits(name: str) -> str:
    parts = name.split(".")
    return next((part for part in parts if part in ("128", "64", "U16", "S16", "U8")), "32").strip("US")


def empty(*shape: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype, requires_grad=grad)


def backward(*outputs: Tensor) -> None:
    """Runs backward from every output, with contiguous gradients, as the next layer gives them."""
    torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


def rms_norm(dtype: torch.dtype, width: int, size: int) -> None:
    x, residual, weight = (empty(*shape, dtype=dtype) for shape in ((size, width), (size, width), (width,)))
    backward(kernels.rms_norm(x, weight, backend="triton"))
    backward(*kernels.add_rms_norm(x, residual, weight, backend="triton"))


def rope(dtype: torch.dtype, width: int, size: int) -> None:
    q, k, _ = empty(2, size // 2, 10, width, dtype=dtype).split((6, 2, 2), dim=2)
    cos, sin = (empty(size // 2, width // 2, dtype=torch.float32, grad=False) for _ in range(2))
    backward(*kernels.rope(q, k, cos, sin, backend="triton"))


def norm_rope(dtype: torch.dtype, width: int, size: int) -> None:
    qkv, q_weight, k_weight = (empty(*shape, dtype=dtype) for shape in ((2, size // 2, 10 * width), (width,), (width,)))
    cos, sin = (empty(size // 2, width // 2, dtype=torch.float32, grad=False) for _ in range(2))
    backward(*kernels.norm_rope(qkv, q_weight, k_weight, cos, sin, n_heads=6, backend="triton"))


def swiglu(dtype: torch.dtype, width: int, size: int) -> None:
    gate, up = (empty(size, width, dtype=dtype) for _ in range(2))
    backward(kernels.swiglu(gate, up, backend="triton"))
    backward(kernels.swiglu(empty(size, 2 * width, dtype=dtype), backend="triton"))


def attention(dtype: torch.dtype, width: int, size: int) -> None:
    q, k, v = empty(2, size, 8, width, dtype=dtype).split((4, 2, 2), dim=2)  # slices of one projection, as in the model
    doc_start = torch.empty(2, size, device="meta", dtype=torch.int32)
    for options in ({"doc_start": doc_start}, {}, {"causal": False}):
        backward(kernels.attention(q, k, v, **options, backend="triton"))
    kernels.attention(q[:, :1], k, v, doc_start=doc_start[:, :1], backend="triton")
    kernels.attention(q[:, :1], k, v, backend="triton")


def cached_attention(dtype: torch.dtype, width: int, size: int) -> None:
    qkv, norm = empty(2, 10, width, dtype=dtype, grad=False), empty(width, dtype=dtype, grad=False)
    keys, values = (empty(2, 2, size, width, dtype=dtype, grad=False) for _ in range(2))
    cos, sin = (empty(size, width // 2, dtype=torch.float32, grad=False) for _ in range(2))
    position, first = (empty(n, dtype=torch.int64, grad=False) for n in (1, 2))
    for visible, norms in product((256, size), (None, (norm, norm))):
        kernels.cached_attention(qkv, keys, values, cos, sin, position, first, visible, norms)


def cross_entropy(dtype: torch.dtype, width: int, size: int) -> None:
    logits, target = empty(size, width, dtype=dtype), empty(size, dtype=torch.int64, grad=False)
    factor = empty(size, dtype=torch.float32, grad=False)
    vocab_size = width - 47  # as 50257 is padded to 50304
    options = Options(vocab_size, -100, z_loss=1e-4)
    backward(kernels.cross_entropy(logits, target, reduction="none", backend="triton", **options._asdict()))
    cross_entropy_in_place(logits.detach(), target, None, *options)
    cross_entropy_in_place(logits.detach(), target, factor, *options)
    cross_entropy_in_place(logits.detach(), target, None, *options._replace(z_loss=0.0))


def sampling(dtype: torch.dtype, width: int, size: int) -> None:
    logits = empty(size, width, dtype=dtype, grad=False)
    uniforms, top_p = (empty(n, dtype=torch.float64, grad=False) for n in (size, 1))
    temperature, min_p = (empty(1, dtype=torch.float32, grad=False) for _ in range(2))
    top_k = empty(1, dtype=torch.int64, grad=False)
    out = empty(size, dtype=torch.int64, grad=False), empty(size, dtype=torch.float32, grad=False)
    kernels.likeliest_tokens(logits, out, backend="triton")
    kernels.drawn_tokens(logits, uniforms, temperature, top_k, top_p, min_p, out, backend="triton")


@dataclass(frozen=True)
class Gated:
    """How to compile the kernels of an op."""

    call: Callable[[torch.dtype, int, int], None]  # launches every kernel of the op; arguments: dtype, width, size
    width: int  # used if a row of a tile table has none
    size: int
    variants: dict[str, int]  # {kernel: binaries per call}


OPS = {
    "attention": Gated(  # causal within documents, causal, neither; decoding is always causal
        attention, 128, 4096, {"forward": 3, "decode": 2, "dq": 3, "dkdv": 3}
    ),
    "cached_attention": Gated(  # of one split and of several; with and without norms
        cached_attention, 128, 4096, {"step": 4, "sum": 1}
    ),
    "cross_entropy": Gated(  # in place with and without a factor, and without a z_loss
        cross_entropy, 128256, 4096, {"loss": 1, "gradient": 1, "in_place": 3}
    ),
    "norm_rope": Gated(norm_rope, 128, 4096, {"forward": 1, "backward": 1}),
    "rms_norm": Gated(rms_norm, 768, 4096, {"forward": 2, "backward": 2}),  # with and without a residual
    "rope": Gated(rope, 128, 4096, {"rotate": 2}),  # forward and backward
    "sampling": Gated(sampling, 32000, 8, {"keys": 2, "choose": 1}),  # for a draw and for the likeliest token
    "swiglu": Gated(swiglu, 2048, 4096, {"forward": 1, "backward": 1}),  # a packed input uses the same binary
}


def calls_of(op: str, architecture: str) -> list[Call]:
    """Returns calls that together use every row of the op's tile tables.

    Raises Incomplete if an earlier row covers all calls of a row, so that no call uses it.
    """
    calls = set()
    for kernel in (f"{op}.{name}" for name in launching.kernels_of(op)):
        for row in launching.rows(kernel, architecture):
            call = row["bytes"], row["width"] or OPS[op].width, row["size"] or OPS[op].size
            if launching.row_of(kernel, architecture, *call) is not row:
                raise Incomplete(f"{kernel} on {architecture}: an earlier row covers {row}")
            calls.add(call)
    return sorted(calls)


def binaries(architecture: str, op: str, calls: Iterable[Call]) -> list[Binary]:
    """Returns every kernel that these calls of an op launch on an architecture, sorted by name.

    Raises Incomplete unless each call compiled every kernel of the op in all its variants.
    """
    calls = list(calls)
    with compiling(architecture) as compiled:
        for element_bytes, width, size in calls:
            OPS[op].call(torch.bfloat16 if element_bytes == 2 else torch.float32, width, size)
    _check_complete(architecture, op, calls, compiled)
    found: list[Binary] = []
    for launch in {id(launch.binary): launch for launch in compiled}.values():
        binary = read(launch.binary, launch.meta, launch.dtype)
        if binary not in found:
            found.append(binary)
    return numbered(found)


def numbered(found: Iterable[Binary]) -> list[Binary]:
    """Sorts binaries by name, and those of one name by their facts, which then have numbers in their names."""
    seen: Counter[str] = Counter()
    result = []
    for binary in sorted(found, key=lambda binary: (binary.name, json.dumps(binary.facts(), sort_keys=True))):
        seen[binary.name] += 1
        result.append(replace(binary, number=seen[binary.name]))
    return result


def _check_complete(architecture: str, op: str, calls: list[Call], compiled: list[Launch]) -> None:
    """Raises Incomplete unless every call has compiled each kernel with tiles in all its variants."""
    if not compiled:
        raise Incomplete(f"{op} on {architecture}: no binary; its launchers did not run")
    found = Counter((kernel, call) for kernel, call, _ in {(x.kernel, x.call, id(x.binary)) for x in compiled})
    variants = OPS[op].variants
    expected = {(f"{op}.{name}", call): variants[name] for name in launching.kernels_of(op) for call in calls}
    for kernel, call in sorted(found.keys() | expected.keys()):
        n_found, n_expected = found[kernel, call], expected.get((kernel, call), 0)
        if n_found != n_expected:
            raise Incomplete(
                f"{kernel} on {architecture}: {n_found} binaries instead of {n_expected} for "
                f"{call[0]} bytes, width {call[1]}, size {call[2]}"
            )


def names_of(op: str, golden: Iterable[str]) -> set[str]:
    """Returns the names in the golden file that belong to an op."""
    return {name for name in golden if name.startswith(f"_{op}_")}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", nargs="*", choices=launching.ARCHITECTURES, default=launching.ARCHITECTURES)
    parser.add_argument("--op", nargs="*", choices=OPS, default=list(OPS))
    parser.add_argument("--write", action="store_true", help=f"replace these entries of {GOLDEN.name}")
    options = parser.parse_args()
    golden: dict[str, Any] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"binaries": {}}
    wrong = 0
    for architecture in options.architecture:
        print(f"{architecture}: registers, bytes spilled, bytes shared, warps, matrix instructions, loads by bits")
        expected = golden["binaries"].setdefault(architecture, {})
        for op in options.op:
            try:
                found = binaries(architecture, op, calls_of(op, architecture))
            except Incomplete as error:
                print(f"error: {error}", file=sys.stderr)
                wrong += 1
                continue
            for binary in found:
                name, known = binary.name, expected.get(binary.name)
                changed = "" if known == binary.facts() else "new" if known is None else "differs"
                faults = binary.faults(architecture)
                wrong += bool(faults) + bool(changed and not options.write)
                print(
                    f"  {binary.registers:3} {binary.spilled:5} {binary.shared:6} {binary.warps:2} "
                    f"{json.dumps(binary.matrix):16} {json.dumps(binary.loads):28} {name} {changed}"
                    + "".join(f"\n      {fault}" for fault in faults)
                )
            for name in sorted(names_of(op, expected) - {binary.name for binary in found}):
                wrong += not options.write
                print(f"  {name} is gone")
                del expected[name]
            if options.write:
                expected |= {binary.name: binary.facts() for binary in found}
    if options.write:
        _write(golden["binaries"])
    return 1 if wrong else 0


def _write(found: dict[str, dict[str, Any]]) -> None:
    """Writes one kernel per line, so that a diff shows each change."""
    by_architecture = (
        f"{json.dumps(architecture)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(facts)}" for name, facts in sorted(entries.items()))
        + "\n}"
        for architecture, entries in sorted(found.items())
    )
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    GOLDEN.write_text('{"binaries": {\n' + ",\n".join(by_architecture) + "\n}}\n")


if __name__ == "__main__":
    sys.exit(main())
