"""The configuration: one JSON file, read into strict models. The defaults and their meaning stand here, nowhere else.

Batch size and horizon are stated in tokens, so they do not depend on the number of processes.
"""

import difflib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llm.errors import UserError

# Keys of earlier releases, which their configs and checkpoints still hold: (section, key) -> (its default, what happens
# now). The default asks for nothing special; any other value asks for what the program no longer does.
REMOVED_KEYS: dict[tuple[str, str], tuple[Any, str]] = {
    ("data", "io"): ("pread", "shards are always read with pread"),
}

ActivationCheckpointing = Literal["none", "selective", "full"]


class Section(BaseModel):
    # forbid: a misspelt key would train with the default. strict: the text "1" is not taken for the number 1.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """A Llama-family decoder: pre-RMSNorm, RoPE, SwiGLU, grouped-query attention; no biases, no dropout."""

    n_layers: int = Field(ge=1, le=1_000)
    d_model: int = Field(ge=16)
    n_heads: int = Field(ge=1, description="query heads; the head dimension is d_model / n_heads")
    n_kv_heads: int = Field(ge=1, description="key and value heads; divides n_heads")
    d_ff: int = Field(ge=1, description="inner width of SwiGLU")
    vocab_size: int | None = Field(None, ge=2, description="null: taken from the data")
    max_seq_len: int = Field(2048, ge=2, description="longest sequence the model is meant for, in tokens")
    rope_theta: float = Field(10_000.0, gt=0)
    norm_eps: float = Field(1e-6, gt=0)
    qk_norm: bool = Field(False, description="RMSNorm on each query and key head, before RoPE")
    tie_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        # First, because head_dim below is a floor division.
        if self.d_model % self.n_heads:
            raise ValueError(f"model.d_model {self.d_model} is not a multiple of model.n_heads {self.n_heads}")
        if self.head_dim % 16:
            raise ValueError(
                f"model.d_model / model.n_heads = {self.head_dim}: the head dimension must be a multiple of 16"
            )
        if self.head_dim > 256:
            raise ValueError(f"model.d_model / model.n_heads = {self.head_dim}: the head dimension may be at most 256")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"model.n_heads {self.n_heads} is not a multiple of model.n_kv_heads {self.n_kv_heads}")
        return self


class SourceConfig(Section):
    path: str = Field(description="a directory made by `llm prepare_data`")
    weight: float = Field(gt=0, description="its share of the sequences, against the other sources' weights")


class DataConfig(Section):
    """Either `path` or `sources`."""

    path: str | None = Field("data/shards", description="a directory made by `llm prepare_data`")
    sources: list[SourceConfig] | None = Field(
        None, min_length=1, max_length=64, description="a mixture of several such directories, with weights"
    )
    seq_len: int | None = Field(None, ge=2, description="tokens a sequence; null: what the shards were prepared for")
    loader_threads: int = Field(2, ge=1, le=64)

    @model_validator(mode="before")
    @classmethod
    def _path_gives_way(cls, tree: Any) -> Any:
        """The default path stands for nothing where sources are named."""
        # Before validation, while a path that the user has set can still be told from the default.
        return {"path": None, **tree} if isinstance(tree, dict) and tree.get("sources") is not None else tree

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.sources is None):
            raise ValueError(
                "data.path and data.sources: name exactly one of them (data.path=null or data.sources=null drops one)"
            )
        return self


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) with it. Norms and embeddings are not decayed."""

    kind: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: for the matrices inside the blocks, AdamW for the rest; at zero_stage 0, 1 and 2"
    )
    lr: float = Field(6e-4, gt=0, description="peak learning rate")
    muon_lr: float | None = Field(None, gt=0, description="that of the matrices inside the blocks; null: lr")
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")

    @model_validator(mode="after")
    def _muon_lr_belongs_to_muon(self) -> Self:
        if self.muon_lr is not None and self.kind != "muon":
            raise ValueError(f"optimizer.muon_lr is for optimizer.kind=muon, not {self.kind}")
        return self


class ScheduleConfig(Section):
    """Linear warmup, then down from optimizer.lr to min_lr_ratio of it at train.total_tokens."""

    kind: Literal["cosine", "linear", "wsd"] = Field(
        "cosine", description="wsd: stays at optimizer.lr until the last decay_tokens, then linear"
    )
    warmup_tokens: int = Field(0, ge=0)
    decay_tokens: int | None = Field(None, ge=0, description="of wsd; null: a fifth of train.total_tokens")
    min_lr_ratio: float = Field(0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _decay_belongs_to_wsd(self) -> Self:
        if self.decay_tokens is not None and self.kind != "wsd":
            raise ValueError(f"schedule.decay_tokens is for schedule.kind=wsd, not {self.kind}")
        return self


class TrainConfig(Section):
    total_tokens: int = Field(ge=1)
    global_batch_tokens: int = Field(ge=1, description="tokens an optimizer step, over all processes")
    micro_batch: int | None = Field(None, ge=1, description="sequences a process holds at once; null: chosen at start")
    seed: int = Field(1337, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="auto: bf16 with fp32 masters where the device multiplies it, else fp32; fp16 scales its loss",
    )
    compile: bool = Field(False, description="torch.compile of every block")
    activation_checkpointing: ActivationCheckpointing = Field(
        "none",
        description="what backward computes again: nothing, all of each block, or all but products and attention",
    )
    max_minutes: float | None = Field(None, gt=0, description="save and stop after this long")
    z_loss: float = Field(0.0, ge=0, description="weight of lse^2 in the loss, which keeps logits small; 1e-4 is usual")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="what a loss or gradient that is not finite does: end the run, or leave out the step"
    )
    max_skips: int = Field(10, ge=0, description="steps that a run may leave out with on_nonfinite=skip")
    log_every_steps: int = Field(10, ge=1)
    eval_every_steps: int = Field(500, ge=1, description="validation also runs at the start and at the end")
    eval_tokens: int | None = Field(None, ge=1, description="validation tokens a time; null: all there are")
    sample_prompts: list[str] = Field(
        default_factory=list, max_length=16, description="texts that the model continues at each validation"
    )
    monitor: list[Literal["tensorboard", "wandb", "csv"]] = Field(
        default_factory=list, description="where metrics go beside metrics.jsonl, by DeepSpeed's monitors"
    )
    init_from: str | None = Field(None, description="a checkpoint whose weights (and nothing else) to start from")

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _once_a_switch(cls, value: Any) -> Any:
        """Configs and checkpoints from when it was true or false keep their meaning."""
        # Before validation, because true and false are no values of the Literal.
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class CheckpointConfig(Section):
    dir: str = Field("artifacts/checkpoints", description="the run's folder")
    every_steps: int = Field(1000, ge=1)
    keep_last: int = Field(3, ge=1, description="older checkpoints are deleted, but for those of the next two keys")
    keep_every_steps: int | None = Field(None, ge=1, description="checkpoints of these steps are kept for good")
    keep_best: bool = Field(True, description="the one of the least validation loss, of those saved at a validation")
    gather_bytes: int = Field(
        64_000_000_000,
        ge=0,
        description="a checkpoint of more (12 bytes a parameter) is written by all ranks, each a part, not by rank 0",
    )


class DeepSpeedConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "cpu"] = Field(
        "none", description="cpu: masters and moments in the host's memory, where they are updated; not at zero_stage 0"
    )
    extra: dict[str, Any] = Field(default_factory=dict, description="merged into the generated DeepSpeed JSON")

    @model_validator(mode="after")
    def _one_place_for_each_setting(self) -> Self:
        # DeepSpeed would train with one value while the plan, the schedule and the log use the other.
        ours = {
            "train_batch_size": "train.global_batch_tokens",
            "train_micro_batch_size_per_gpu": "train.micro_batch",
            "gradient_accumulation_steps": "train.global_batch_tokens and train.micro_batch",
            "gradient_clipping": "optimizer.grad_clip",
            "bf16": "train.precision",
            "fp16": "train.precision",
            "optimizer": "the section optimizer",
            "scheduler": "the section schedule",
            **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "train.monitor"),
        }
        taken = [f"deepspeed.extra.{key} is set by {ours[key]}" for key in self.extra if key in ours]
        zero = self.extra.get("zero_optimization", {})
        for key, setting in (("stage", "zero_stage"), ("offload_optimizer", "offload")):
            # `extra` is DeepSpeed's JSON, which only DeepSpeed validates.
            if isinstance(zero, dict) and key in zero:
                taken.append(f"deepspeed.extra.zero_optimization.{key} is set by deepspeed.{setting}")
        if taken:
            raise ValueError("; ".join(taken))
        return self


class Config(Section):
    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.data.seq_len is not None and self.data.seq_len > self.model.max_seq_len:
            raise ValueError(f"data.seq_len {self.data.seq_len} is above model.max_seq_len {self.model.max_seq_len}")
        if self.optimizer.kind == "muon" and self.deepspeed.zero_stage == 3:
            raise ValueError(
                "optimizer.kind=muon does not train at deepspeed.zero_stage 3 (it cuts every weight apart): use "
                "deepspeed.zero_stage=2, 1 or 0, or optimizer.kind=adamw for a new run"
            )
        if self.deepspeed.zero_stage == 3 and self.train.activation_checkpointing == "selective":
            raise ValueError(
                "train.activation_checkpointing=selective does not train at deepspeed.zero_stage 3 (weights are "
                "gathered while a block is computed again): use train.activation_checkpointing=full or "
                "deepspeed.zero_stage=2"
            )
        if self.deepspeed.zero_stage == 0 and self.train.precision == "fp16":
            raise ValueError(
                "train.precision=fp16 does not train at deepspeed.zero_stage 0 (its loss is not scaled): "
                "use deepspeed.zero_stage=1 or train.precision=bf16"
            )
        if self.deepspeed.zero_stage == 0 and self.deepspeed.offload == "cpu":
            raise ValueError(
                "deepspeed.offload=cpu needs partitions of the optimizer's state, and deepspeed.zero_stage 0 has none: "
                "use deepspeed.zero_stage=1 or deepspeed.offload=none"
            )
        return self


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Reads a JSON file and `section.key=value` overrides.

    Raises UserError with every problem at once, each naming its key and, for an unknown one, the nearest.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; name a JSON file such as {path}/125m.json") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; a config is JSON text") from None
    try:
        tree = json.loads(text, parse_float=_number)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a JSON object with the sections {', '.join(Config.model_fields)}")
    # Applied to the tree, so that a value is validated with the others, wherever it comes from.
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, source=str(path))


def parse_config(tree: dict[str, Any], source: str) -> Config:
    """Validates a config tree, which an earlier release may have written; `source` names it in errors."""
    try:
        return Config.model_validate(_without_removed_keys(tree, source))
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_problems(error))) from None


def _without_removed_keys(tree: Any, source: str) -> Any:
    """A copy of the tree without the keys of REMOVED_KEYS; a line on stderr names each that held another value.

    It is no error, because a checkpoint of an earlier release must stay readable for good.
    """
    if not isinstance(tree, dict):
        return tree
    # Two levels deep, because keys are popped below and the caller keeps the tree.
    tree = {name: dict(section) if isinstance(section, dict) else section for name, section in tree.items()}
    for (section, key), (default, now) in REMOVED_KEYS.items():
        if isinstance(tree.get(section), dict) and key in tree[section]:
            value = tree[section].pop(key)
            # Compared as JSON: to Python, False and 0 are equal.
            if json.dumps(value) != json.dumps(default):
                _note(f"{source}: {section}.{key} = {json.dumps(value)} is left out: this key was removed; {now}")
    return tree


@lru_cache
def _note(text: str) -> None:
    """Shows a line once, and by one rank; a run reads the same config several times."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    section, dot, name = key.partition(".")
    if not equals or not dot or not name:
        raise UserError(f"{override}: an override is written section.key=value, such as train.seed=1")
    # A section that does not exist is made here; validation then reports it with the nearest name.
    node = tree.setdefault(section, {})
    *parents, name = name.split(".")
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise UserError(f"{override}: {key.rpartition('.')[0]} is not a section")
    node[name] = _value(value)


def _value(text: str) -> Any:
    """JSON where it is JSON, an integer where it may be written 200_000_000, else the text itself."""
    # Before JSON, which has no 1_000.
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return json.loads(text, parse_float=_number)
    except json.JSONDecodeError:
        return text


def _number(text: str) -> float | int:
    """A JSON float; 2.5e9 is an integer, so that token counts may be written so."""
    number = float(text)
    return int(number) if "e" in text.lower() and number.is_integer() else number


def _problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _known_keys(problem["loc"][:-1])
            # cutoff=0: even a poor match shows the user a key that exists.
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0)
            yield f"unknown key {where}; the nearest is {'.'.join([*map(str, problem['loc'][:-1]), near[0]])}"
        elif problem["type"] == "missing":
            yield f"{where} is missing"
        elif problem["type"] == "value_error":
            # Our validators' own text; pydantic's message puts "Value error, " before it.
            yield str(problem["ctx"]["error"])
        else:
            message = problem["msg"]
            yield f"{where} = {json.dumps(problem['input'], default=str)}: {message[0].lower()}{message[1:]}"


def _known_keys(location: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location:
        if isinstance(part, int):  # an entry of data.sources
            model = SourceConfig
            continue
        annotation = model.model_fields[str(part)].annotation
        # `int | None` and Literal are no classes, and issubclass raises TypeError for them.
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)
