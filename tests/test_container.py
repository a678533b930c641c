"""The Dockerfile, executed line by line in a clean root, where Debian stands in for its base image.

It needs root, debootstrap (`apt-get install debootstrap`) and a mirror of Debian. CONTAINER_BASE names a folder with
such a root, made before; it is copied.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASE_PACKAGES = "ca-certificates,python3,python3-venv,python3-dev"
"""What python:slim has: Python with its headers."""


def instructions() -> list[tuple[str, str]]:
    """(name, arguments) of each instruction, with its lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    lines = text.replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


def arguments_of(name: str) -> list[str]:
    return [rest for each, rest in instructions() if each == name]


def test_the_image_is_for_a_python_of_this_project_and_its_user_is_not_root() -> None:
    (base,) = arguments_of("FROM")
    version = re.fullmatch(r"python:(3\.\d+)-slim-\w+", base)
    assert version is not None
    assert f"Python :: {version[1]}" in (ROOT / "pyproject.toml").read_text()
    assert arguments_of("USER") == ["1000:1000"]
    assert json.loads(arguments_of("ENTRYPOINT")[0]) == ["llm"]


def test_what_git_ignores_is_not_sent_to_docker() -> None:
    ignored = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    for pattern in (ROOT / ".gitignore").read_text().splitlines():
        assert pattern.strip("/") in ignored


@dataclass
class Image:
    """A root folder, and what the instructions so far have set."""

    root: Path
    shared: list[Path]
    """Folders of this machine that are seen in it, too: those of pip's indexes."""
    variables: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "root"

    def expand(self, text: str) -> str:
        return re.sub(r"\$\{?(\w+)\}?", lambda match: self.variables.get(match[1], ""), text)

    def run(self, command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a shell command as docker does, in namespaces of its own."""
        mounts = [("/proc", "/proc"), ("/dev", "/dev"), *((str(path), str(path)) for path in self.shared)]
        script = "".join(
            f"mkdir -p {self.root}{inside}; mount --rbind {outside} {self.root}{inside};" for outside, inside in mounts
        )
        # Of the user's line in passwd: name, password, uid, gid, comment, home.
        users = [line.split(":") for line in (self.root / "etc/passwd").read_text().splitlines()]
        home = next(fields[5] for fields in users if self.user.partition(":")[0] in (fields[0], fields[2]))
        environment = {"HOME": home, **self.variables}
        inner = f"cd {shlex.quote(self.folder)} && {command}"
        script += shlex.join(
            [
                *("exec", "chroot", f"--userspec={self.user}", str(self.root), "/usr/bin/env", "-i"),
                *(f"{name}={value}" for name, value in environment.items()),
                *("/bin/sh", "-c", inner),
            ]
        )
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script], capture_output=True, text=True
        )
        assert not check or done.returncode == 0, done.stdout[-2_000:] + done.stderr[-4_000:]
        return done

    def execute(self, name: str, rest: str) -> None:
        """Carries out one instruction."""
        if name in ("ARG", "ENV"):
            for each in shlex.split(rest):
                variable, _, value = each.partition("=")
                # As with --build-arg: this machine's setting goes before the file's.
                self.variables[variable] = os.environ.get(variable, "") if name == "ARG" else self.expand(value)
        elif name == "WORKDIR":
            self.folder = rest
            (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif name == "USER":
            self.user = rest
        elif name == "COPY":
            assert rest == f"--chown={self.user} . ."
            self.copy_the_tree()
        elif name == "RUN":
            self.run(rest)
        else:
            assert name in ("FROM", "HEALTHCHECK", "ENTRYPOINT", "CMD"), name

    def copy_the_tree(self) -> None:
        listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, capture_output=True, check=True, text=True).stdout.split("\0")
        target = self.root / self.folder.lstrip("/")
        for name in filter(None, names):
            if (ROOT / name).exists():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target / name)
        shell = Image(self.root, [])
        shell.variables["PATH"] = self.variables["PATH"]
        shell.run(f"chown -R {self.user} {self.folder}")


def pip_settings() -> dict[str, str]:
    """The user's settings of pip, as its variables."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    settings = dict(re.findall(r"^[^.\n]+\.([\w-]+)='(.*)'$", listed, re.M))
    return {f"PIP_{name.upper().replace('-', '_')}": value for name, value in settings.items()}


def local_paths(text: str) -> Iterator[Path]:
    for word in text.split():
        path = Path(urlsplit(word).path if word.startswith("file://") else word)
        if path.is_absolute() and path.exists():
            yield path


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    made = os.environ.get("CONTAINER_BASE")
    if os.geteuid() or not (made or shutil.which("debootstrap")):
        pytest.skip("needs root and debootstrap")
    root = tmp_path_factory.mktemp("container") / "root"
    if made:
        subprocess.run(["cp", "-a", made, root], check=True)
    else:
        base = ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm", root]
        subprocess.run(base, check=True, capture_output=True)
    settings = pip_settings()
    named = [path for value in settings.values() for path in local_paths(value)]
    # An index in a folder may link to its neighbours.
    shared = sorted({Path(*path.parts[:3]) for path in named if path.is_dir()})
    for path in [*named, Path("/etc/resolv.conf")]:
        if path.is_file():
            (root / str(path)[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / str(path)[1:])
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    made_of = Image(root, shared, {"PATH": path, **settings})
    for name, rest in instructions():
        made_of.execute(name, rest)
    return made_of


@pytest.mark.slow
@pytest.mark.timeout(7_200)
def test_the_image_holds_the_pinned_environment_and_passes_its_health_check(image: Image) -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    frozen = dict(re.findall(r"^([\w.-]+)==(\S+)$", image.run("pip freeze").stdout, re.M))
    installed = {name: version.partition("+")[0] for name, version in frozen.items() if name in pins}
    assert {"torch", "deepspeed", "numpy"} <= set(installed)
    assert installed == {name: pins[name] for name in installed}
    assert image.run("id -un").stdout == "llm\n"
    command = arguments_of("HEALTHCHECK")[0].partition("CMD ")[2]
    assert "kernels" in image.run(shlex.join(json.loads(command))).stdout
    assert image.run("llm --version").stdout.startswith("llm-from-scratch ")


@pytest.mark.slow
@pytest.mark.timeout(7_200)
def test_the_quickstart_runs_in_the_image(image: Image) -> None:
    smaller = "train.total_tokens=65536 train.eval_tokens=8192 train.device=cpu"
    done = image.run(f"python -m llm.tools.quickstart {smaller}")
    assert "bits per byte" in done.stdout + done.stderr
    assert list((image.root / "work/artifacts").glob("**/latest/model.safetensors"))
