"""Finds a checkpoint and reads its state, its tensors and its model.

llm/training/saving.py writes checkpoints and describes the folder.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter, ValidationError

from llm.config import Config, ModelConfig, TrainConfig, parse_config
from llm.data.tokenizer import Tokenizer, load_tokenizer
from llm.errors import UserError
from llm.model.hf import from_hf
from llm.model.tensor_files import open_tensors
from llm.model.transformer import Transformer, check_backend, parameter_shapes

# There is no conversion between formats: read_state rejects every other number.
FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
STATE_FILE = "state.json"
OPTIMIZER_STEP = "step"
"""Suffix of the files `optimizer-...` that hold the optimizer's update counts; torch has the same name for them."""
MAX_STATE_BYTES = 1 << 20
"""A larger state.json is rejected: no run writes one, and parsing it could take all memory."""

Count = Annotated[int, Field(ge=0, lt=2**62)]


@dataclass(frozen=True)
class DataState:
    """A run's position in its data. Together with seed and order version it determines every later sample."""

    dataset_hash: str
    seq_len: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    order_version: str
    position: Count


@dataclass(frozen=True)
class TrainState:
    """A run's progress, as in state.json."""

    step: Count
    tokens: Count
    data: DataState
    skipped: Count = 0  # steps left out because the loss or its gradient was not finite
    val_loss: float | None = None  # of the validation directly after this step, if there was one
    overflows: Count = 0  # steps left out because the loss scale of fp16 was too high
    loss_scaler: dict[str, int | float] | None = None  # with fp16: what Engine.read_loss_scaler returns
    # For train.stop_patience, of the validations at every train.eval_every_steps-th step: the least loss, and how many
    # came after it.
    best_val_loss: float | None = None
    worse_validations: Count = 0

    def validated(self, loss: float, train: TrainConfig) -> "TrainState":
        """Returns the state with the loss of a validation after its step, in nats.

        Only a validation at every train.eval_every_steps-th step is counted: a run that was stopped has others, too,
        and must end at the same step as one that was not. The one before the first step is not counted, because no
        checkpoint is made there.
        """
        state = replace(self, val_loss=loss)
        if self.step == 0 or not self.validation_due(train):
            return state
        # A loss that is NaN or infinite counts as worse.
        if math.isfinite(loss) and (self.best_val_loss is None or loss < self.best_val_loss):
            return replace(state, best_val_loss=loss, worse_validations=0)
        return replace(state, worse_validations=self.worse_validations + 1)

    def validation_due(self, train: TrainConfig) -> bool:
        """Whether a validation is due after this step, however the run goes on."""
        return self.step % train.eval_every_steps == 0

    @property
    def is_best(self) -> bool:
        """Whether the validation after this step had a new least loss."""
        return self.worse_validations == 0 and self.val_loss is not None and self.val_loss == self.best_val_loss

    def out_of_patience(self, train: TrainConfig) -> bool:
        return train.stop_patience is not None and self.worse_validations >= train.stop_patience

    def is_complete(self, train: TrainConfig) -> bool:
        """Whether a run with these settings has nothing more to do."""
        return self.tokens >= train.horizon or self.out_of_patience(train)


_STATE = TypeAdapter(TrainState)


def saved(run_dir: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, oldest first."""
    # Exactly eight digits: an unfinished checkpoint is ".step-NNNNNNNN.tmp" (llm.atomic) and must not match.
    return sorted(run_dir.glob("step-" + "[0-9]" * 8))


def locate(path: str | os.PathLike[str]) -> Path:
    """Returns the checkpoint folder for a path: the path itself, or the latest checkpoint in a run's folder.

    Raises UserError if there is none.
    """
    path = Path(path)
    for candidate in (path, path / "latest", *saved(path)[-1:]):  # a run can be killed before it links `latest`
        if (candidate / STATE_FILE).is_file():
            return candidate.resolve()
    if path.is_symlink() or path.exists():
        raise UserError(f"{path}: {_what_it_is(path)}")
    raise UserError(f"{path}: no such checkpoint; `llm train` writes them under checkpoint.dir")


def _what_it_is(path: Path) -> str:
    """Says what a path without a checkpoint holds, and what to name or do instead."""
    files = {file.name for file in path.iterdir()} if path.is_dir() else set()
    runs = sorted(child.parent.name for child in path.glob("*/run.json"))
    if "run.json" in files:
        return "a run that has no checkpoint yet (checkpoint.every_steps; status.json says how it ended); wait for one"
    if "manifest.json" in files:
        return "a directory of shards, not a checkpoint; name the folder of a run that was trained on it"
    if "config.json" in files and any(file.startswith("model") and "safetensors" in file for file in files):
        return f"a Hugging Face model folder, not a checkpoint; make one of it: llm import --from {path} --out_dir DIR"
    if any(file.endswith(".gguf") for file in files):
        return "an exported GGUF model, not a checkpoint; name the run that it was exported from"
    if runs:
        return f"not a checkpoint, but the parent folder of {len(runs)} runs; name one, such as {path / runs[0]}"
    if path.is_file():
        return "a file; a checkpoint is a folder, step-NNNNNNNN in a run's folder"
    return f"not a checkpoint (no {STATE_FILE} in it); name a step-NNNNNNNN folder or a run's folder"


def read_state(path: Path) -> tuple[TrainState, Config]:
    """Reads the state and the config of a checkpoint. Raises UserError for a damaged file."""
    file = path / STATE_FILE
    try:
        if file.stat().st_size > MAX_STATE_BYTES:
            raise ValueError(f"{file.stat().st_size} bytes")
        text = file.read_text("utf-8")
        tree = json.loads(text)
        # The version is checked before the fields, because fields of another format would be reported as damage.
        version = tree["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{file}: checkpoint format {version}; this program reads {FORMAT_VERSION}")
        # strict, because pydantic accepts "3" or 3.0 for a count.
        # Without the config, whose paths need not be UTF-8; pydantic's own reader of JSON refuses those.
        state = _STATE.validate_json(json.dumps({**tree, "config": None}), strict=True)
        return state, parse_config(tree["config"], source=str(file))
    except ValidationError as error:
        wrong = error.errors()[0]
        what = f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
    # json.loads raises RecursionError for deep nesting.
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
    raise UserError(f"{file}: damaged ({what}); use another checkpoint")


def read_weights(path: Path, model: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, fp32 value) of each parameter. Raises UserError if the checkpoint has another shape."""
    yield from read_tensors(path, "model", model, parameter_shapes(model))


def read_tensors(
    path: Path, stem: str, model: ModelConfig, names: Iterable[str], least: float = -math.inf
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, fp32 value) of each named parameter from the files of this stem; see `open_tensors`."""
    with open_tensors(path, stem, least) as get:
        for name in names:
            try:
                yield name, from_hf(model, name, get)
            except ValueError as error:
                raise UserError(f"{path}: {stem} is of another shape: {error}; use another checkpoint") from None


def load_model(
    path: str | os.PathLike[str],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    tok: str | os.PathLike[str] | None = None,
) -> tuple[Transformer, Tokenizer]:
    """Loads the model and the tokenizer of a checkpoint, for evaluation and generation. Needs no deepspeed.

    Raises UserError for an incomplete checkpoint, and if `tok` is not the tokenizer of its training.
    """
    check_backend(device)
    folder = locate(path)
    _, config = read_state(folder)
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    # The tokenizers are compared first, because reading the weights takes far longer.
    if tok is not None and load_tokenizer(tok).sha256 != tokenizer.sha256:
        raise UserError(f"{tok}: not the tokenizer that {path} was trained with; leave --tok out to use its own")
    try:
        # Made on meta first: to_empty then allocates the weights once, on the target device.
        with torch.device("meta"):
            model = Transformer(config.model)
        model.to_empty(device=device)
    # torch.OutOfMemoryError is a RuntimeError, and so is what the CPU's allocator raises.
    except RuntimeError as error:
        what = f"{folder}: a model that does not fit this machine ({str(error).splitlines()[0]})"
        raise UserError(f"{what}; take a machine with more memory, or another checkpoint") from None
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in read_weights(folder, config.model):
            parameters[name].copy_(value)
    return model.to(dtype).eval(), tokenizer
