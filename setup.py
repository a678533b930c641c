"""Builds the C++ of csrc/: llm.data._shards, and of csrc/cpu/ kernels._cpu. Everything else is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup


def extension(name: str, folder: str, threads: str) -> Pybind11Extension:
    return Pybind11Extension(
        name,
        sorted(glob(f"{folder}/*.cpp")),
        depends=sorted(glob("csrc/**/*.hpp", recursive=True)),
        cxx_std=17,
        extra_compile_args=["-O3", "-Wall", "-Wextra", threads],
        extra_link_args=[threads],
    )


setup(
    ext_modules=[
        extension("llm.data._shards", "csrc", "-pthread"),
        extension("kernels._cpu", "csrc/cpu", "-fopenmp"),
    ]
)
