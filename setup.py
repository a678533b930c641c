"""Builds the C++ extensions, one for each folder of csrc/. Everything else is in pyproject.toml."""

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
        extension("llm.data._shards", "csrc/shards", "-pthread"),
        extension("llm.data._encoder", "csrc/encoder", "-pthread"),
        extension("llm.inference._decoder", "csrc/decoder", "-pthread"),
        extension("kernels._cpu", "csrc/cpu", "-fopenmp"),
    ]
)
