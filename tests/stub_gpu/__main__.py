"""`make stub-gpu`: runs tests/stub_gpu on the real CUDA builds of torch, Triton and DeepSpeed, without a GPU.

A library stands in for CUDA's driver and runtime, cuBLAS and NCCL: memory, copies, streams, events and graphs work, and
kernels are counted and compute nothing. So all code of the host runs, and every number that a kernel would compute is
garbage.

python -m tests.stub_gpu [ARGUMENT OF PYTEST ...]
python -m tests.stub_gpu --run COMMAND ...          another command, e.g. python -m llm doctor
python -m tests.stub_gpu --write                    counts again: benchmarks/results/stub-gpu.json
"""

import os
import sys

from .environment import ROOT, build, python_with_cuda, variables


def main(arguments: list[str]) -> None:
    python = python_with_cuda()
    environment = {**os.environ, **variables(build(python))}
    environment["PATH"] = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    os.chdir(ROOT)
    if arguments[:1] == ["--run"]:
        os.execvpe(arguments[1], arguments[1:], environment)
    if arguments == ["--write"]:
        os.execve(python, [str(python), "-m", "tests.stub_gpu.steps", "--write"], environment)
    pytest = [str(python), "-m", "pytest", "-m", "stub_gpu", "-p", "no:cacheprovider", "--tb=short"]
    files = [] if any(argument.startswith("tests/") for argument in arguments) else ["tests/stub_gpu"]
    os.execve(python, [*pytest, *arguments, *files], environment)


if __name__ == "__main__":
    main(sys.argv[1:])
