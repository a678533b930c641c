"""Every bit of a checkpoint is under a checksum, and every reader checks what it reads."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llm.errors import DamagedCheckpoint, UserError
from llm.inference.eval_tasks import _check_folder as check_for_tasks
from llm.model import checkpoint, checkpoint_path, checksums
from llm.model.checkpoint import load_model, verify
from llm.tools.average import average
from llm.tools.export import export

Llm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ckpt(random_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint_path.locate(random_checkpoint), tmp_path / "run/step-00000000"))


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def flip_an_exponent(ckpt: Path) -> None:
    file = ckpt / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    flip(file, 8 * (header + 4 * 1234 + 3) + 1)


def test_an_intact_one_has_no_problems_and_a_plain_model_folder(ckpt: Path) -> None:
    assert verify(ckpt) == []
    assert {file.name for file in ckpt.iterdir()} == {
        *("model.safetensors", "config.json", "state.json"),
        *("tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    }


def test_every_flipped_bit_is_found(ckpt: Path) -> None:
    chance = random.Random(1)
    for file in sorted(ckpt.iterdir()):
        before = file.read_bytes()
        size = 8 * len(before)
        # In a .safetensors also in the header.
        for bit in [*chance.choices(range(size), k=12), *chance.choices(range(min(size, 8 * 3000)), k=12), 0, size - 1]:
            flip(file, bit)
            problems = verify(ckpt)
            # JSON has more than one way to write the same: these bits change nothing.
            if file.name == "state.json" and not problems:
                assert json.loads(file.read_bytes()) == json.loads(before)
            else:
                assert problems, (file.name, bit)
                assert str(file) in problems[0]
            file.write_bytes(before)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "tokenizer.model", "config.json"])
def test_a_missing_file_is_found(ckpt: Path, name: str) -> None:
    (ckpt / name).unlink()
    assert verify(ckpt) == [f"{ckpt / name}: missing"]


@pytest.mark.parametrize(
    "read",
    [
        lambda run: load_model(run, torch.device("cpu")),
        lambda run: export(run, run.parent / "export"),
        lambda run: export(run, run.parent / "export", max_file_bytes=10_000),
        lambda run: average(run, run.parent / "average"),
    ],
)
def test_every_reader_refuses_a_flipped_bit_of_an_exponent(ckpt: Path, read: Callable[[Path], object]) -> None:
    flip_an_exponent(ckpt)
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors: damaged \(the checksum of .* does not match\)"):
        read(ckpt.parent)
    assert [path.name for path in ckpt.parent.parent.iterdir()] == ["run"], "nothing is left"


@pytest.mark.parametrize(
    "read",
    [
        lambda run: load_model(run, torch.device("cpu")),
        lambda run: export(run, run.parent / "export"),
        lambda run: average(run, run.parent / "average"),
        lambda run: check_for_tasks(run, None),
    ],
)
def test_every_reader_refuses_another_tokenizer(ckpt: Path, read: Callable[[Path], object]) -> None:
    tokenizer = bytearray((ckpt / "tokenizer.model").read_bytes())
    tokenizer[20] ^= 1
    (ckpt / "tokenizer.model").write_bytes(tokenizer)
    with pytest.raises(DamagedCheckpoint, match=r"tokenizer\.model: damaged, or of another model"):
        read(ckpt.parent)


def test_the_harness_gets_no_damaged_file(ckpt: Path) -> None:
    flip(ckpt / "tokenizer.json", 800)
    with pytest.raises(DamagedCheckpoint, match=r"tokenizer\.json: damaged"):
        check_for_tasks(ckpt, None)


def test_an_older_one_is_read_with_one_line(ckpt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = json.loads((ckpt / "state.json").read_text())
    old = {key: value for key, value in tree.items() if key not in ("files", "tensors", "checksum")}
    (ckpt / "state.json").write_text(json.dumps(old | {"format_version": 1}))
    for _ in range(2):
        load_model(ckpt, torch.device("cpu"))
    said = capsys.readouterr().err
    assert said.count("was written by an earlier release, without checksums: it is read unchecked") == 1
    assert verify(ckpt) == []
    # A checkpoint of today cannot be turned into an older one by the loss of its checksums.
    (ckpt / "state.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="its checksum does not match"):
        checkpoint.read_state(ckpt)


def test_a_changed_state_keeps_its_checksums(ckpt: Path) -> None:
    checkpoint.write_state(ckpt, {"val_loss": 3.5})
    assert verify(ckpt) == []
    assert checkpoint.read_state(ckpt)[0].val_loss == 3.5


def test_a_problem_is_one_line_whatever_state_json_names(ckpt: Path) -> None:
    tree = json.loads((ckpt / "state.json").read_text())
    tree["tensors"]["model"]["two\nlines"] = "00000000"
    (ckpt / "state.json").write_text(json.dumps(checksums.sealed(tree)))
    (problem,) = verify(ckpt)
    assert "no tensor two\\nlines" in problem


def test_inspect_verifies_a_run_and_names_the_damaged_checkpoint(ckpt: Path, llm_here: Llm) -> None:
    shutil.copytree(ckpt, ckpt.with_name("step-00000001"))
    code, out, err = llm_here("inspect", ckpt.parent, "--verify")
    assert (code, "2 checkpoints, " in err, "every checksum is right" in err) == (0, True, True), err
    flip_an_exponent(ckpt)
    code, out, err = llm_here("inspect", ckpt.parent, "--verify", "--json")
    assert code == 1
    assert json.loads(out)["failed"] == ["step-00000000"]
    assert "error: failed: step-00000000; see above" in err
