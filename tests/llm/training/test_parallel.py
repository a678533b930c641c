"""On one process or several, at ZeRO 0 to 3, with AdamW or Muon, in fp32 and bf16, a run sees the same samples and has
the same losses. Resumed on the processes that it was saved on, it changes no bit.

RUNS is the table of all runs, by the number of processes they run on. A training step of these runs takes milliseconds,
but starting processes takes many seconds, so all runs on one number of processes share one launch of scenarios.py. It
happens when a test first asks for one of its runs, after the launches whose runs its own resume from: one process comes
first, then three, then two.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import SMALL_MODEL, deepspeed, newton_schulz, numbers_of, read_losses, small_config
from safetensors.torch import load_file

from llm.config_file import parse_config
from llm.data.manifest import read_manifest
from llm.data.shards import Loader
from llm.metrics import read_metrics
from llm.model.checkpoint import load_model, read_weights
from llm.model.checkpoint_path import saved
from llm.model.hf import to_hf
from llm.model.transformer import Transformer

SCENARIOS = Path(__file__).parent / "scenarios.py"
STEPS = 50
TOKENS = STEPS * 512
SEQUENCES = 8
"""Sequences of a step's global batch."""


# What varies. Each list holds all cases; only those of the sample are not slow.

COMBINATIONS = [(precision, stage) for precision in ("fp32", "bf16") for stage in range(4)]
SOME_COMBINATIONS = [("fp32", 1), ("fp32", 3), ("bf16", 0), ("bf16", 2)]

# (precision, sequences of a micro-batch, ZeRO stage): on two processes, 8 sequences leave one process without, 4 are
# one micro-batch each.
MUON_STEPS = [("fp32", 8, 0), ("fp32", 4, 1), ("fp32", 2, 2), ("bf16", 8, 2), ("bf16", 4, 1), ("bf16", 2, 0)]
SOME_MUON_STEPS = [("fp32", 8, 0), ("fp32", 2, 2), ("bf16", 4, 1)]
MUON_UPDATES = 3
MUON_STAGES = (0, 1, 2)

# (ZeRO stage, what is not finite on rank 1 alone)
POISONED = [(stage, what) for stage in (1, 3) for what in ("loss", "gradient")]
SOME_POISONED = [(1, "gradient"), (3, "loss")]

# (precision, ZeRO stage, deepspeed.offload) that a run on one process at stage 1 moves to on two.
MOVES = [
    *(("fp32", stage, "none") for stage in (0, 2, 3)),
    *(("fp32", stage, "cpu") for stage in (1, 2, 3)),
    ("bf16", 0, "none"),
]
SOME_MOVES = [("fp32", 0, "none"), ("fp32", 2, "cpu")]


def sampled(everything: Sequence[tuple], sample: Sequence[tuple]) -> list:
    """Parameters of a test; those that are not in the sample are slow."""
    assert set(sample) <= set(everything)
    return [
        pytest.param(*case, id="-".join(map(str, case)), marks=[] if case in sample else pytest.mark.slow)
        for case in everything
    ]


# Settings of a run.


def zero(precision: str, stage: int) -> dict[str, Any]:
    return {"train__precision": precision, "deepspeed__zero_stage": stage}


def save_every(steps: int) -> dict[str, Any]:
    return {"checkpoint__every_steps": steps}


PROMPTS = {"train__sample_prompts": ["def f(", "import"]}
MUON = {"optimizer__kind": "muon", "optimizer__muon_lr": 6e-3}
Z_LOSS = {"train__z_loss": 1e-2}
TIED = {"model__tie_embeddings": True, "model__qk_norm": True}
PATIENCE = {
    "train__stop_patience": 3,
    "train__eval_every_steps": 1,
    "optimizer__lr": 5e-2,
    "schedule__warmup_tokens": 0,
    "schedule__kind": "wsd",
}
"""The validation loss falls to step 4 and is higher at the next three."""
_TWELVE_STEPS = {"train__same_bits": True, "train__total_tokens": 12 * 512, **save_every(4)}
SAME_BITS = {
    "adamw": {**_TWELVE_STEPS, "train__micro_batch": 1, **zero("fp32", 1)},
    "muon": {**_TWELVE_STEPS, "train__micro_batch": 2, **zero("bf16", 1), **MUON},
}
"""Eight micro-batches a step, and four."""
EACH_RANK_SAVES_A_PART = {"checkpoint__gather_bytes": 0, **zero("fp32", 3)}


@dataclass(frozen=True)
class PlannedRun:
    """One line of the table of runs."""

    name: str
    """Of its folder. A second run of the same name goes on in the folder of the first."""
    settings: dict[str, Any]
    """Changes to the small config."""
    resume: tuple[int, str, int] | None = None
    """(processes, name, step) of the checkpoint that it begins from; None: the newest in its own folder, if any."""
    accidents: dict[str, Any] | None = None
    """die_after, poison or full_disk; see scenarios.Scenario."""
    in_folder_of: int | None = None
    """It goes on in the folder of the run of its name on so many processes; None: on its own number."""
    slow: bool = False
    """Whether only slow tests need it."""


def killed(name: str, settings: dict[str, Any], slow: bool = False) -> list[PlannedRun]:
    """A run that saves at steps 20 and 40, is killed after step 33, and is started again."""
    settings = {**save_every(20), **settings}
    return [PlannedRun(name, settings, accidents={"die_after": 33}, slow=slow), PlannedRun(name, settings, slow=slow)]


def muon_updates() -> list[PlannedRun]:
    """Runs of a few updates by Muon, each of which is saved."""
    return [
        PlannedRun(
            f"muon-{precision}-{sequences}-{stage}",
            {
                **MUON,
                **zero(precision, stage),
                "train__micro_batch": sequences,
                "checkpoint__every_steps": 1,
                "checkpoint__keep_last": MUON_UPDATES,
            },
            accidents={"die_after": MUON_UPDATES},
            slow=(precision, sequences, stage) not in SOME_MUON_STEPS,
        )
        for precision, sequences, stage in MUON_STEPS
    ]


def runs_on_one_process() -> list[PlannedRun]:
    """Every precision once, since one process runs all stages below 3 as stage 0."""
    return [
        PlannedRun("fp32", {**save_every(20), **PROMPTS, **zero("fp32", 1)}),
        PlannedRun("fp32-accumulated", {"train__micro_batch": 2, **zero("fp32", 1)}),
        PlannedRun("fp32-recomputed", {"train__activation_checkpointing": "selective", **zero("fp32", 1)}),
        PlannedRun("z-loss", {**Z_LOSS, **zero("fp32", 1)}),
        PlannedRun("bf16", {**save_every(20), **zero("bf16", 1)}),
        PlannedRun("muon", {**save_every(20), **MUON}),  # at the default stage, which one process runs as stage 0
        *muon_updates(),
        PlannedRun("auto", {**save_every(20), **zero("fp32", 1)}, accidents={"die_after": 20}),
        *(PlannedRun(f"bits-{kind}", settings) for kind, settings in SAME_BITS.items()),
        *(
            PlannedRun(f"moved-bits-{kind}", settings, accidents={"die_after": 6})
            for kind, settings in SAME_BITS.items()
        ),
    ]


def runs_on_three_processes() -> list[PlannedRun]:
    """Steps 21 and 22 of one process's runs, at stage 3. One of three processes has none of a step's last sequences."""
    return [
        PlannedRun(
            f"moved-{precision}",
            {**save_every(11), "train__micro_batch": 1, **zero(precision, 3)},
            resume=(1, precision, 20),
            accidents={"die_after": 22},
            slow=precision != "fp32",
        )
        for precision in ("fp32", "bf16")
    ] + [
        # The boundaries of three partitions cut matrices apart.
        PlannedRun(
            "moved-muon",
            {**save_every(11), "train__micro_batch": 1, **MUON, **zero("fp32", 2)},
            resume=(1, "muon", 20),
            accidents={"die_after": 22},
        )
    ]


def runs_on_two_processes() -> list[PlannedRun]:
    runs: list[PlannedRun] = []
    for precision, stage in COMBINATIONS:
        settings, slow = zero(precision, stage), (precision, stage) not in SOME_COMBINATIONS
        runs.append(PlannedRun(f"{precision}-{stage}", {**PROMPTS, **settings}, slow=slow))
        runs += killed(f"killed-{precision}-{stage}", settings, slow)
    runs += [
        # The 8 sequences of a step are not a multiple of 2 processes x 3 sequences: some slots stay empty.
        PlannedRun("uneven", {"train__micro_batch": 3, **zero("fp32", 2)}),
        PlannedRun("recomputed", {"train__activation_checkpointing": "full", **zero("fp32", 3)}),
        # Two micro-batches a step on each rank, recomputed, with weights gathered for each module.
        PlannedRun(
            "z-loss",
            {**Z_LOSS, "train__micro_batch": 2, "train__activation_checkpointing": "full", **zero("fp32", 3)},
        ),
        PlannedRun("tied-2", {**TIED, **zero("fp32", 2)}),
        PlannedRun("tied-3", {**TIED, **zero("fp32", 3)}),
        *(PlannedRun(f"muon-{stage}", {**MUON, **zero("fp32", stage)}, slow=stage == 1) for stage in MUON_STAGES),
        *(
            run
            for stage in MUON_STAGES
            for run in killed(f"killed-muon-{stage}", {**MUON, **zero("fp32", stage)}, slow=stage < 2)
        ),
        *muon_updates(),
        *(
            PlannedRun(f"moved-muon-{stage}", {**MUON, **zero("fp32", stage)}, resume=(1, "muon", 20), slow=stage > 0)
            for stage in MUON_STAGES
        ),
        PlannedRun("moved-again-muon", {**MUON, **zero("fp32", 1)}, resume=(3, "moved-muon", 22)),
        *killed("parts", EACH_RANK_SAVES_A_PART),
        PlannedRun("patience", {**PATIENCE, **zero("fp32", 2)}),
        PlannedRun("killed-patience", {**PATIENCE, **save_every(5), **zero("fp32", 2)}, accidents={"die_after": 6}),
        PlannedRun("killed-patience", {**PATIENCE, **save_every(5), **zero("fp32", 2)}),
        PlannedRun("auto", {"train__micro_batch": 3, **save_every(20), **zero("fp32", 3)}, in_folder_of=1),
        *(
            PlannedRun(f"bits-{kind}-{stage}", {**settings, "deepspeed__zero_stage": stage})
            for kind, settings in SAME_BITS.items()
            for stage in (0, 1)
        ),
        # From one process to two at stage 0 at step 4, and to stage 1 at step 8.
        *(
            PlannedRun(
                f"moved-bits-{kind}", {**settings, "deepspeed__zero_stage": stage}, accidents=death, in_folder_of=1
            )
            for kind, settings in SAME_BITS.items()
            for stage, death in ((0, {"die_after": 10}), (1, {}))
        ),
    ]
    runs += [
        PlannedRun(
            f"moved-{precision}-{stage}-{offload}",
            {**zero(precision, stage), "deepspeed__offload": offload},
            resume=(1, precision, 20),
            slow=(precision, stage, offload) not in SOME_MOVES,
        )
        for precision, stage, offload in MOVES
    ]
    runs += [
        PlannedRun(
            f"moved-again-{precision}",
            {"train__micro_batch": 3, **zero(precision, 2)},
            resume=(3, f"moved-{precision}", 22),
            slow=precision != "fp32",
        )
        for precision in ("fp32", "bf16")
    ]
    # Rank 1 finds no space at step 20. Killed after step 25, the run resumes from step 10, and finds none at step 30.
    for step, death in ((20, {"die_after": 25}), (30, {})):
        accidents = {"full_disk": {"rank": 1, "step": step}, **death}
        runs.append(PlannedRun("full", {**EACH_RANK_SAVES_A_PART, **save_every(10)}, accidents=accidents))
    for stage, what in POISONED:
        poison = {"rank": 1, "step": 5, "what": what}
        slow = (stage, what) not in SOME_POISONED
        name = f"poisoned-{stage}-{what}"
        runs.append(PlannedRun(name, zero("fp32", stage), accidents={"poison": poison}, slow=slow))
    return runs


RUNS = {1: runs_on_one_process(), 3: runs_on_three_processes(), 2: runs_on_two_processes()}


def launch(processes: int, scenarios: list[dict[str, Any]], folder: Path) -> None:
    """Runs scenarios on so many processes; their stderr is in folder/stderr."""
    folder.mkdir(exist_ok=True)
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    if processes == 1:
        done = subprocess.run([sys.executable, SCENARIOS, folder], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4_000:]
    else:
        done = deepspeed(processes, SCENARIOS, folder)
    (folder / "stderr").write_text(done.stderr)


class Runs:
    """The folders of the runs in RUNS, by the number of their processes and their name."""

    def __init__(self, shards: Path, output: Path, with_slow: bool) -> None:
        self.shards, self.output, self.with_slow = shards, output, with_slow

    def __call__(self, processes: int, name: str) -> Path:
        folder = self.launch_folder(processes)
        if not folder.exists():
            launch(processes, self.scenarios(processes), folder)
        assert (folder / "stderr").exists(), "the launch has failed in an earlier test"
        return folder / name

    def stderr(self, processes: int) -> str:
        return (self.launch_folder(processes) / "stderr").read_text()

    def launch_folder(self, processes: int) -> Path:
        return self.output / f"{processes} processes"

    def scenarios(self, processes: int) -> list[dict[str, Any]]:
        scenarios = []
        for run in RUNS[processes]:
            if run.slow and not self.with_slow:
                continue
            if run.in_folder_of is None:
                folder = self.launch_folder(processes) / run.name
            else:
                folder = self(run.in_folder_of, run.name)
            resume = "auto"
            if run.resume is not None:
                where, name, step = run.resume
                resume = str(self(where, name) / f"step-{step:08d}")
            config = small_config(self.shards, folder, **{"train__total_tokens": TOKENS, **run.settings})
            scenarios.append({"config": config, "resume": resume, **(run.accidents or {})})
        return scenarios


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """runs(processes, name): the folder of a run; runs.stderr(processes): what a launch printed."""
    with_slow = any(item.get_closest_marker("slow") for item in request.session.items)
    return Runs(small_shards, tmp_path_factory.mktemp("runs"), with_slow)


# What the tests read and compare.


def held(run: Path, step: int, when: str) -> dict[str, Any]:
    """Hashes of all weights and moments that the engine held at a step, and the optimizer's update counts."""
    found: dict[str, Any] = json.loads((run / f"held-{step}-{when}.json").read_text())
    return found


def sequences_of(run: Path) -> dict[int, str]:
    """The hash of every sequence that entered the model, by position."""
    sequences: dict[int, str] = {}
    for file in run.glob("sequences-*.json"):
        mine = {int(position): digest for position, digest in json.loads(file.read_text()).items()}
        assert not sequences.keys() & mine.keys(), "two ranks took the same position"
        sequences |= mine
    return sequences


def assert_same_run(whole: Path, resumed: Path) -> None:
    """Losses and the last checkpoint are equal bit for bit."""
    assert read_losses(resumed) == read_losses(whole)
    last = f"step-{STEPS:08d}"
    for file in sorted((whole / last).glob("*.safetensors")):
        assert file.read_bytes() == (resumed / last / file.name).read_bytes(), file.name


def assert_moved(whole: Path, legs: list[Path], precision: str) -> None:
    """The legs continue one another to the end, each from a checkpoint of the one before, whatever they ran on.

    They have the whole run's samples and losses, and each begins with just what the one before has saved.
    """
    expected_sequences, expected_losses = sequences_of(whole), read_losses(whole)
    assert sorted(expected_sequences) == list(range(STEPS * SEQUENCES))
    first, all_losses = (1e-5, 1e-5) if precision == "fp32" else (1e-3, 2e-3)
    for before, leg in zip([None, *legs], legs, strict=False):
        (began,) = leg.glob("held-*-began.json")
        step = int(began.name.split("-")[1])
        assert held(leg, step, "began")["updates"] == [float(step)]
        if before is not None:
            assert held(leg, step, "began") == held(before, step, "saved")
        sequences, losses = sequences_of(leg), read_losses(leg)
        end = step + len(losses)
        assert sequences == {
            position: expected_sequences[position] for position in range(SEQUENCES * step, SEQUENCES * end)
        }
        assert losses[0] == pytest.approx(expected_losses[step], rel=0, abs=first)
        assert losses == pytest.approx(expected_losses[step:end], rel=0, abs=all_losses)
    assert end == STEPS, "the last leg goes to the end"


# The same losses on any number of processes.


def test_losses_fall(runs: Runs) -> None:
    losses = read_losses(runs(1, "fp32"))
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(("precision", "stage"), sampled(COMBINATIONS, SOME_COMBINATIONS))
def test_two_processes_have_the_losses_of_one(runs: Runs, precision: str, stage: int) -> None:
    expected = read_losses(runs(1, precision))
    assert len(expected) == STEPS
    tolerance = 1e-5 if precision == "fp32" else 2e-3
    assert read_losses(runs(2, f"{precision}-{stage}")) == pytest.approx(expected, rel=0, abs=tolerance)
    assert expected == pytest.approx(read_losses(runs(1, "fp32")), rel=0, abs=2e-2)


@pytest.mark.parametrize(
    ("processes", "name"), [(1, "fp32-accumulated"), (1, "fp32-recomputed"), (2, "uneven"), (2, "recomputed")]
)
def test_micro_batch_and_recomputation_change_no_loss(runs: Runs, processes: int, name: str) -> None:
    assert read_losses(runs(processes, name)) == pytest.approx(read_losses(runs(1, "fp32")), rel=0, abs=1e-5)


def test_two_processes_have_the_z_loss_of_one(runs: Runs) -> None:
    one, two = (
        [
            (line["loss"], line["z_loss"])
            for line in read_metrics(runs(processes, "z-loss") / "metrics.jsonl")
            if "lr" in line
        ]
        for processes in (1, 2)
    )
    assert all(z_loss > 0 for _, z_loss in one)
    assert np.array(two) == pytest.approx(np.array(one), rel=0, abs=1e-4)
    assert [loss for loss, _ in one] != read_losses(runs(1, "fp32"))


def test_tied_embeddings_train_the_same_at_every_stage(runs: Runs) -> None:
    expected = read_losses(runs(2, "tied-2"))
    assert len(expected) == STEPS
    assert read_losses(runs(2, "tied-3")) == pytest.approx(expected, rel=0, abs=1e-5)


def test_validation_is_the_same_on_any_number_of_processes(runs: Runs) -> None:
    def val_losses(run: Path) -> list[float]:
        return [line["val_loss"] for line in read_metrics(run / "metrics.jsonl") if "val_loss" in line]

    expected = val_losses(runs(1, "fp32"))
    assert len(expected) == 2
    assert val_losses(runs(2, "fp32-3")) == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=pytest.mark.slow) if stage in (0, 2) else stage for stage in range(4)]
)
def test_samples_are_the_same_at_every_stage(runs: Runs, stage: int) -> None:
    def first_samples(run: Path) -> list[dict[str, str]]:
        return read_metrics(run / "metrics.jsonl")[0]["samples"]

    expected = first_samples(runs(1, "fp32"))
    assert [len(sample["text"]) > 20 for sample in expected] == [True, True]
    assert first_samples(runs(2, f"fp32-{stage}")) == expected


# Killed and resumed.


def test_two_processes_end_together_where_the_validation_loss_has_turned(runs: Runs) -> None:
    whole, killed = runs(2, "patience"), runs(2, "killed-patience")
    status = json.loads((whole / "status.json").read_text())
    assert (status["status"], status["result"]["step"]) == ("complete", 7)
    assert "stopped: no better validation loss for 3 validations" in status["message"]
    assert read_losses(killed) == read_losses(whole)
    assert (killed / "best").readlink() == (whole / "best").readlink() == Path("step-00000004")


@pytest.mark.parametrize(("precision", "stage"), sampled(COMBINATIONS, SOME_COMBINATIONS))
def test_killed_and_resumed_is_bit_for_bit_the_same(runs: Runs, precision: str, stage: int) -> None:
    assert_same_run(runs(2, f"{precision}-{stage}"), runs(2, f"killed-{precision}-{stage}"))


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2])
def test_muon_killed_and_resumed_is_bit_for_bit_the_same(runs: Runs, stage: int) -> None:
    assert_same_run(runs(2, f"muon-{stage}"), runs(2, f"killed-muon-{stage}"))


@pytest.mark.slow  # as fp16 is on most processors
def test_fp16_on_two_processes_is_resumed_bit_for_bit(runs: Runs, small_shards: Path, tmp_path: Path) -> None:
    def scenario(name: str, stage: int, **accidents: int) -> dict[str, Any]:
        settings = {"train__total_tokens": TOKENS, **save_every(20), **zero("fp16", stage)}
        return {"config": small_config(small_shards, tmp_path / name, **settings), **accidents}

    scenarios = []
    for stage in (1, 2, 3):
        scenarios.append(scenario(f"{stage}", stage))
        scenarios.append(scenario(f"killed-{stage}", stage, die_after=33))
        scenarios.append(scenario(f"killed-{stage}", stage))
    launch(2, scenarios, tmp_path)
    for stage in (1, 2, 3):
        assert read_losses(tmp_path / f"{stage}") == pytest.approx(read_losses(runs(1, "fp32")), rel=0, abs=5e-3)
        assert_same_run(tmp_path / f"{stage}", tmp_path / f"killed-{stage}")


# Moved to other processes and stages.


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_run_moves_from_one_process_to_three_to_two_and_through_the_stages(runs: Runs, precision: str) -> None:
    whole = runs(1, precision)
    assert_moved(whole, [whole, runs(3, f"moved-{precision}"), runs(2, f"moved-again-{precision}")], precision)


@pytest.mark.parametrize(("precision", "stage", "offload"), sampled(MOVES, SOME_MOVES))
def test_a_run_moves_to_more_processes_another_stage_and_the_host(
    runs: Runs, precision: str, stage: int, offload: str
) -> None:
    whole = runs(1, precision)
    assert_moved(whole, [whole, runs(2, f"moved-{precision}-{stage}-{offload}")], precision)


def test_auto_goes_on_in_the_runs_folder_on_another_number_of_processes_and_another_stage(runs: Runs) -> None:
    runs(2, "auto")
    whole, moved = runs(1, "fp32"), runs(1, "auto")
    assert json.loads((moved / "run.json").read_text())["world_size"] == 2
    assert held(moved, 20, "began") == held(whole, 20, "saved")
    assert sequences_of(moved) == sequences_of(whole)
    assert read_losses(moved) == pytest.approx(read_losses(whole), rel=0, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chain",
    [
        [(2, 1, 4), (1, 1, 2), (4, 1, 1)],
        [(2, 2, 2), (3, 2, 2), (2, 2, 3)],
        [(2, 1, 1), (2, 3, 4), (2, 2, 2)],
        [(4, 3, 1), (1, 2, 8), (3, 1, 1)],
        [(2, 0, 2), (3, 3, 1), (1, 0, 3)],
    ],
    ids=lambda chain: "-".join(f"{processes}x{stage}" for processes, stage, _ in chain),
)
def test_a_run_moves_anywhere(
    runs: Runs, small_shards: Path, tmp_path: Path, chain: list[tuple[int, int, int]]
) -> None:
    """chain: (processes, ZeRO stage, sequences of a micro-batch) of each leg. All but the last are four steps long."""
    legs = [tmp_path / str(leg) for leg in range(len(chain))]
    for leg, (processes, stage, micro_batch) in enumerate(chain):
        scenarios = []
        for precision in ("fp32", "bf16"):
            settings = {**save_every(4), "train__micro_batch": micro_batch, **zero(precision, stage)}
            config = small_config(small_shards, legs[leg] / precision, train__total_tokens=TOKENS, **settings)
            resume = str(legs[leg - 1] / precision / "latest") if leg > 0 else "auto"
            end = None if leg == len(chain) - 1 else 4 * (leg + 1)
            scenarios.append({"config": config, "resume": resume, "die_after": end})
        launch(processes, scenarios, legs[leg])
    for precision in ("fp32", "bf16"):
        assert_moved(runs(1, precision), [leg / precision for leg in legs], precision)


# Every sum in one order.


def assert_same_bits(whole: Path, other: Path) -> None:
    """All numbers of metrics.jsonl but times, and the bytes of every checkpoint's tensors."""
    assert numbers_of(other) == numbers_of(whole)
    files = sorted(whole.glob("step-*/*.safetensors"))
    assert len(files) >= 3 * 4
    for file in files:
        assert file.read_bytes() == (other / file.relative_to(whole)).read_bytes(), file.relative_to(whole)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("kind", SAME_BITS)
def test_with_same_bits_two_processes_change_no_bit(runs: Runs, kind: str, stage: int) -> None:
    assert_same_bits(runs(1, f"bits-{kind}"), runs(2, f"bits-{kind}-{stage}"))


@pytest.mark.parametrize("kind", SAME_BITS)
def test_with_same_bits_a_run_moves_to_two_processes_and_another_stage_and_changes_no_bit(
    runs: Runs, kind: str
) -> None:
    runs(2, f"moved-bits-{kind}")
    assert_same_bits(runs(1, f"bits-{kind}"), runs(1, f"moved-bits-{kind}"))


def test_without_same_bits_two_processes_do_change_bits(runs: Runs) -> None:
    assert read_losses(runs(2, "fp32-1")) != read_losses(runs(1, "fp32"))


# Saving.


def test_ranks_that_write_a_part_each_save_the_same_as_one_that_gathers_all(
    runs: Runs, small_shards: Path, tmp_path: Path, llm_here: Callable[..., tuple[int, str, str]]
) -> None:
    whole, parts = runs(2, "fp32-3") / "latest", runs(2, "parts") / "latest"
    for stem in ("model", "optimizer-exp_avg", "optimizer-exp_avg_sq", "optimizer-step"):
        expected = load_file(whole / f"{stem}.safetensors")
        files = sorted(parts.glob(f"{stem}-*-of-00002.safetensors"))
        found = [load_file(file) for file in files]
        assert len(files) == 2
        assert min(map(len, found)) > 2, "both ranks wrote"
        assert {name: file.name for file, tensors in zip(files, found, strict=True) for name in tensors} == json.loads(
            (parts / f"{stem}.safetensors.index.json").read_text()
        )["weight_map"]
        joined = found[0] | found[1]
        assert joined.keys() == expected.keys()
        assert all(torch.equal(joined[name], expected[name]) for name in expected), stem
    assert read_losses(runs(2, "parts")) == read_losses(runs(2, "fp32-3"))

    theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(parts, dtype=torch.float32)
    ours, _ = load_model(parts, torch.device("cpu"))
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)

    tree = small_config(small_shards, tmp_path / "run", train__total_tokens=TOKENS + 512, deepspeed__zero_stage=1)
    (tmp_path / "config.json").write_text(json.dumps(tree))
    for name, source in (("run", parts), ("whole", whole)):
        arguments = ["--config", tmp_path / "config.json", f"checkpoint.dir={tmp_path / name}", "--resume", source]
        assert llm_here("train", *arguments)[0] == 0
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "whole")


def test_a_rank_that_finds_no_space_for_its_part_costs_one_checkpoint_and_not_the_run(runs: Runs) -> None:
    run = runs(2, "full")
    for step in (20, 30):
        failed = f"{run}/step-{step:08d}: the checkpoint could not be written: rank 1: No space left on device"
        assert f"{failed}; older ones are untouched" in runs.stderr(2)
    before = [json.loads((run / f"sequences-0-{rank}.json").read_text()) for rank in (0, 1)]
    assert sum(map(len, before)) == 25 * SEQUENCES, "the first run went on after step 20"
    assert (run / "sequences-10-0.json").exists(), "the second began at step 10, whose checkpoint was complete"
    assert [path.name for path in saved(run)] == ["step-00000020", "step-00000040", "step-00000050"]
    assert not list(run.glob(".*"))
    assert_same_run(runs(2, "parts"), run)


@pytest.mark.parametrize(("stage", "what"), sampled(POISONED, SOME_POISONED))
def test_one_bad_rank_ends_the_run_on_all_as_it_was_a_step_before(runs: Runs, stage: int, what: str) -> None:
    run = runs(2, f"poisoned-{stage}-{what}")
    failed = [json.loads((run / f"failed-{rank}.json").read_text()) for rank in (0, 1)]
    assert failed[0] == failed[1]
    assert failed[0]["step"] == 4
    assert "step 5: the loss or its gradient is not finite (positions 32 to 39)" in failed[0]["error"]
    assert held(run, 4, "saved") == held(run, 4, "failed") == held(run, 4, "poisoned")
    assert held(run, 4, "saved")["updates"] == [4.0]
    assert read_losses(run) == read_losses(runs(2, f"fp32-{stage}"))[:4]
    assert (run / "latest").readlink() == Path("step-00000004")


# Muon.


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_muon_on_two_processes_loses_what_it_loses_on_one(runs: Runs, stage: int) -> None:
    expected = read_losses(runs(1, "muon"))
    assert expected[-1] < expected[0] - 0.5
    assert read_losses(runs(2, f"muon-{stage}")) == pytest.approx(expected, rel=0, abs=1e-4)


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_muon_moves_to_two_processes_and_another_stage(runs: Runs, stage: int) -> None:
    moved, whole = runs(2, f"moved-muon-{stage}"), runs(1, "muon")
    assert held(moved, 20, "began") == held(whole, 20, "saved")
    assert read_losses(moved) == pytest.approx(read_losses(whole)[20:], rel=0, abs=1e-4)


def test_muon_moves_from_one_process_to_three_to_two_and_through_the_stages(runs: Runs) -> None:
    whole, three, two = runs(1, "muon"), runs(3, "moved-muon"), runs(2, "moved-again-muon")
    assert held(three, 20, "began") == held(whole, 20, "saved")
    assert held(two, 22, "began") == held(three, 22, "saved")
    assert read_losses(three) + read_losses(two) == pytest.approx(read_losses(whole)[20:], rel=0, abs=1e-4)


Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain_step(small_shards: Path) -> Callable[[int, Path | None], tuple[Tensors, Tensors]]:
    """plain_step(step, checkpoint before it, or None: newly initialised) returns (weights, clipped gradient of the
    step's global batch in one piece), by Hugging Face's names, in fp32.
    """
    config = parse_config(small_config(small_shards, Path("unused")), "plain step")
    manifest = read_manifest(small_shards)
    shape = config.model.model_copy(update={"vocab_size": manifest.vocab_size})
    settings = {"global_batch": 8, "micro_batch": 8, "rank": 0, "world_size": 1}
    with Loader(manifest, "train", seq_len=64, seed=config.train.seed, **settings) as loader:
        batches = [{key: value.clone() for key, value in b._asdict().items()} for b in islice(loader, MUON_UPDATES)]

    def compute(step: int, before: Path | None) -> tuple[Tensors, Tensors]:
        model = Transformer(shape)
        model.init_weights(config.train.seed)
        if before is not None:
            model.load_state_dict(dict(read_weights(before, shape)))
        model(**batches[step - 1], reduction="mean").backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        weights, gradients = {}, {}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            weights |= to_hf(shape, name, parameter.detach())
            gradients |= to_hf(shape, name, parameter.grad)
        return weights, gradients

    return compute


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("precision", "sequences", "stage"), sampled(MUON_STEPS, SOME_MUON_STEPS))
def test_a_step_of_muon_is_the_plain_one(
    runs: Runs, plain_step: Any, precision: str, sequences: int, stage: int, processes: int
) -> None:
    """The momentum takes in the whole batch's gradient, and every matrix moves as in the paper.

    Each step is computed from the checkpoint before it, so that differences do not add up.
    """
    tolerance = 1e-5 if precision == "fp32" else 3e-2
    before, momentum_before = None, None
    for step in range(1, MUON_UPDATES + 1):
        weights, gradients = plain_step(step, before)
        before = runs(processes, f"muon-{precision}-{sequences}-{stage}") / f"step-{step:08d}"
        momentum = load_file(before / "optimizer-momentum_buffer.safetensors")
        after = load_file(before / "model.safetensors")
        assert len(momentum) == 7 * SMALL_MODEL["n_layers"]
        rate = 6e-3 * step / 4  # the warmup is four steps
        for name, buffer in momentum.items():
            buffer = buffer.double()
            old = torch.zeros_like(buffer) if momentum_before is None else momentum_before[name]
            gradient = (buffer - 0.95 * old) / 0.05
            assert (gradient - gradients[name]).norm() < tolerance * gradient.norm(), (step, name)
            nesterov, scale = 0.95 * buffer + 0.05 * gradient, 0.2 * math.sqrt(max(buffer.shape))
            direction = newton_schulz(nesterov)
            update = ((1 - rate * 0.1) * weights[name] - after[name]) / rate / scale
            # fp32 iterates on the Gram matrix, which squares the small singular values: up to 6e-4 at any condition.
            wrong, allowed = (update - direction).norm(), 1e-3 * direction.norm()
            if precision == "bf16":  # what the paper's own products lose there
                allowed = 1.5 * (newton_schulz(nesterov, torch.bfloat16) - direction).norm()
            print(f"{name}: {wrong / direction.norm():.1e} of {allowed / direction.norm():.1e}")
            assert wrong < allowed, (step, name)
        momentum_before = momentum


# Measuring.


@pytest.mark.parametrize(("precision", "stage"), sampled(COMBINATIONS, SOME_COMBINATIONS))
def test_communication_is_measured_at_every_stage(runs: Runs, precision: str, stage: int) -> None:
    parts = ("data_wait_ms", "forward_ms", "backward_ms", "optimizer_ms", "communication_ms")
    for line in read_metrics(runs(2, f"{precision}-{stage}") / "metrics.jsonl"):
        if "loss" in line:
            assert line["communication_ms"] > 0
            assert min(line[part] for part in parts) >= 0
            assert sum(line[part] for part in parts) <= line["step_ms"]


def test_runs_leave_no_shared_memory(runs: Runs) -> None:
    runs(2, "fp32-1")
    assert not [name for name in os.listdir("/dev/shm") if "deepspeed" in name or "shm_allreduce" in name]
