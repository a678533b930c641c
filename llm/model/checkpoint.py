"""Reads a checkpoint: its state, its tensors and its model.

llm/model/checkpoint_path.py finds it. llm/training/saving.py writes checkpoints and describes the folder.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError

from llm.atomic import atomic_text
from llm.config import Config, ModelConfig, TrainConfig
from llm.config_file import parse_config
from llm.data.tokenizer import Tokenizer, load_tokenizer
from llm.errors import DamagedCheckpoint, UserError
from llm.model import checksums
from llm.model.checkpoint_path import STATE_FILE, UNCHECKED_VERSION, locate, read_tree, tell_once
from llm.model.checksums import Checksums
from llm.model.hf import from_hf, hf_names
from llm.model.tensor_files import check_file, open_tensors
from llm.model.transformer import Transformer, check_backend, parameter_shapes

OPTIMIZER_STEP = "step"
"""Suffix of the files `optimizer-...` that hold the optimizer's update counts; torch has the same name for them."""
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
_CHECKSUMS = TypeAdapter(Checksums)
_SETTLED = (
    *("model.vocab_size", "train.total_tokens", "train.global_batch_tokens"),
    *("optimizer.lr", "optimizer.weight_decay", "schedule.warmup_tokens"),
)
"""Keys that are never null in a checkpoint; those of the second line in one that was trained."""


def read_state(path: Path) -> tuple[TrainState, Config]:
    """Reads the state and the config of a checkpoint. Raises UserError for a damaged file."""
    file = path / STATE_FILE
    tree = read_tree(path)
    try:
        # strict, because pydantic accepts "3" or 3.0 for a count; as JSON, because it would then refuse a dict.
        # Without the config, whose paths need not be UTF-8; pydantic's own reader of JSON refuses those.
        state = _STATE.validate_json(json.dumps({**tree, "config": None}), strict=True)
        config = parse_config(tree["config"], source=str(file))
        for key in _SETTLED if state.tokens else _SETTLED[:3]:
            section, name = key.split(".")
            if getattr(getattr(config, section), name) is None:
                raise ValueError(f"{key} is null")
        return state, config
    except ValidationError as error:
        wrong = error.errors()[0]
        what = f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
    raise DamagedCheckpoint(f"{file}: damaged ({what})")


def write_state(path: Path, entries: Mapping[str, Any], sums: Checksums | None = None) -> None:
    """Writes state.json, or replaces entries of one.

    sums: the checksums of the checkpoint's files; None: those that it has.
    """
    before = {} if sums is not None else read_tree(path)
    tree = {**before, **entries, **({} if sums is None else asdict(sums))}
    tree.pop("checksum", None)
    # One of an earlier release stays one: there are no checksums of its tensors.
    if tree["format_version"] != UNCHECKED_VERSION:
        tree = checksums.sealed(tree)
    atomic_text(path / STATE_FILE, json.dumps(tree, indent=2) + "\n")


def read_checksums(path: Path) -> Checksums | None:
    """Returns the checksums of a checkpoint; None for one of an earlier release, with a line on stderr."""
    tree = read_tree(path)
    if tree["format_version"] == UNCHECKED_VERSION:
        tell_once(path, f"{path}: was written by an earlier release, without checksums: it is read unchecked")
        return None
    try:
        return _CHECKSUMS.validate_json(json.dumps({key: tree[key] for key in ("files", "tensors")}), strict=True)
    except (KeyError, ValidationError) as error:
        raise DamagedCheckpoint(f"{path / STATE_FILE}: damaged (no checksums: {type(error).__name__})") from None


def verify(path: Path) -> list[str]:
    """Reads all of a checkpoint; returns a line for each damaged file or tensor."""
    try:
        sums = read_checksums(path)
        config = read_state(path)[1]
        read_tokenizer(path)
    except (UserError, OSError) as error:
        return [getattr(error, "what", str(error))]
    problems = []
    for name in {} if sums is None else sums.files:
        try:
            check_files(path, [name])
        except DamagedCheckpoint as error:
            problems.append(error.what)
    if problems:
        return problems
    hf = [key for name in parameter_shapes(config.model) for key in hf_names(name)]
    tensors = {"model": hf} if sums is None else {stem: list(named) for stem, named in sums.tensors.items()}
    for stem, names in tensors.items():
        for name in names:
            # Opened for each, so that one damaged tensor does not hide the others.
            try:
                with open_tensors(path, stem, sums=sums) as get:
                    get(name)
            except UserError as error:
                # A damaged state.json may name a tensor with a newline in it.
                problems.append(getattr(error, "what", str(error)).replace("\n", "\\n"))
    return problems


def check_files(path: Path, names: Iterable[str]) -> None:
    """Raises DamagedCheckpoint if one of these files, where the checkpoint has it, is not as it was written."""
    sums = read_checksums(path)
    for name in names:
        if sums is not None and name in sums.files:
            if not (path / name).is_file():
                raise DamagedCheckpoint(f"{path / name}: missing")
            check_file(path / name, sums)


def read_tokenizer(path: Path) -> Tokenizer:
    """Loads the tokenizer of a checkpoint. Raises UserError if it is not the one that the model was trained with."""
    file, expected = path / "tokenizer.model", read_tree(path).get("tokenizer_sha256")
    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        what = f"damaged, or of another model ({error})" if file.is_file() else "missing"
        raise DamagedCheckpoint(f"{file}: {what}") from None
    if expected is not None and tokenizer.sha256 != expected:
        raise DamagedCheckpoint(
            f"{tokenizer.path}: damaged, or of another model (its sha256 is not that in {STATE_FILE})"
        )
    return tokenizer


def tokenizer_sha256(path: Path) -> str | None:
    """Returns the hash of the tokenizer that a checkpoint's model was trained with."""
    return read_tree(path).get("tokenizer_sha256")


def read_weights(path: Path, model: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, fp32 value) of each parameter. Raises UserError if the checkpoint has another shape."""
    yield from read_tensors(path, "model", model, parameter_shapes(model))


def read_tensors(
    path: Path, stem: str, model: ModelConfig, names: Iterable[str], least: float = -math.inf
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, fp32 value) of each named parameter from the files of this stem; see `open_tensors`."""
    with open_tensors(path, stem, least, read_checksums(path)) as get:
        for name in names:
            try:
                yield name, from_hf(model, name, get)
            except ValueError as error:
                raise DamagedCheckpoint(f"{path}: {stem} is of another shape: {error}") from None


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
    tokenizer = read_tokenizer(folder)
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
