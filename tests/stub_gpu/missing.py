"""Writes C++ for each CUDA function that the installed torch and Triton call and the stub's sources do not define.

So newer ones need no change here, and the counts of kind "unknown" show which of their calls the stub lacks.
"""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

STUBBED = re.compile(r"_*(cuda[A-Z]|cublas|nccl[A-Z]|cupti|cu[A-Z])")
REAL = re.compile(r"cuFile|cufft|curand|cusolver|cusparse|cudnn")
"""Libraries that load without a driver; torch calls them for what no test here does."""

PLAIN = re.compile(
    "Destroy|Abort|Finalize|Unload|Unregister|Register|SetAttribute|SetAccess|TrimTo|Profiler|EnablePeerAccess"
    "|UpdateCaptureDependencies|FuncSet|KernelSet|CtxSet|SetWorkspace|Upload|ncclGroup|SetSmCountTarget"
)
"""Calls that succeed and do nothing."""

CREATE = re.compile("cublasLt.*Create")
"""Calls that return a handle behind which nobody looks."""

NOT_SUPPORTED = 801
CUPTI_UNKNOWN = 999


def called(libraries: Iterable[Path], c_source: str) -> set[str]:
    """The names of CUDA's functions that these libraries and a source in C call."""
    names = set(re.findall(r"\bcu[A-Z]\w+(?=\()", c_source))
    for library in libraries:
        listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
        names |= {line.split()[-1].split("@")[0] for line in listing.stdout.splitlines() if line.strip()}
    return {name for name in names if STUBBED.match(name) and not REAL.match(name)}


def defined(sources: Iterable[Path]) -> set[str]:
    return {name for path in sources for name in re.findall(r"^EXPORT [^(]*?(\w+)\(", path.read_text("utf-8"), re.M)}


def definition(name: str) -> str:
    argument = ""
    if name.startswith("cupti"):
        body = f"return {CUPTI_UNKNOWN};"
    elif CREATE.match(name):
        argument, body = "void** handle", "return *handle = new int(0), 0;"
    elif PLAIN.search(name):
        body = "return 0;"
    elif name.startswith("cublas") and not re.search("Set|Get", name):
        argument, body = "void* handle", f'return stub_gpu_blas(handle, "{name}");'
    else:
        body = f'return stub::count(stub::Kind::unknown, "{name}"), {NOT_SUPPORTED};'
    return f"EXPORT int {name}({argument}) {{ {body} }}\n"


def missing(libraries: Iterable[Path], c_source: str, sources: Iterable[Path]) -> str:
    """Returns C++ for what `libraries` and `c_source` call and the stub's `sources` do not define."""
    head = '#include "stub.hpp"\nextern "C" int stub_gpu_blas(void* handle, const char* name);\n'
    return head + "".join(map(definition, sorted(called(libraries, c_source) - defined(sources))))
