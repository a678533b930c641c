"""The configuration: one JSON file, read into strict models. Keys, defaults and descriptions are defined only here.

docs/config.md and configs/schema.json are generated from these models by llm/tools/config_keys.py.

Batch size and horizon are stated in tokens, so they do not depend on the number of processes.
"""

import os
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from llm.config_text import is_url

T = TypeVar("T")


def _settled(value: T | None) -> T:
    assert value is not None, "llm.training.resolve fills in what follows from a rule"
    return value


ActivationCheckpointing = Literal["none", "selective", "full"]


def _usable_path(path: str) -> str:
    if not path or "\0" in path:
        # Not a ValueError, whose message would have to name the key.
        raise PydanticCustomError("unusable_path", "a path has one character or more, none of them NUL")
    # A shell expands ~ only at the beginning of a word, so not in checkpoint.dir=~/run.
    return os.path.expanduser(path)


def _local_path(path: str) -> str:
    if is_url(path):
        raise PydanticCustomError(
            "local_path", "a path of this machine is due; only data.path and data.sources may name an object store"
        )
    return _usable_path(path)


FilePath = Annotated[str, AfterValidator(_local_path)]
DataPath = Annotated[str, AfterValidator(_usable_path)]


class Section(BaseModel):
    # forbid, because a misspelt key would train with the default. strict: the text "1" is not the number 1.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RopeScalingConfig(Section):
    """RoPE frequencies for longer sequences than those the model learned them with, as transformers computes them."""

    kind: Literal["linear", "llama3", "yarn"] = Field(
        description="linear: all frequencies divided by factor; llama3: only the low ones; yarn: the low ones, and "
        "cos and sin multiplied by attention_factor"
    )
    factor: float = Field(ge=1, description="longest sequence relative to original_max_seq_len")
    original_max_seq_len: int | None = Field(
        None, ge=1, lt=2**31, description="longest sequence before the scaling, in tokens; required by llama3 and yarn"
    )
    low_freq_factor: float | None = Field(
        None,
        gt=0,
        description="llama3: frequencies of fewer periods in original_max_seq_len are divided by factor; null: 1",
    )
    high_freq_factor: float | None = Field(
        None, gt=0, description="llama3: frequencies of more periods in original_max_seq_len are kept; null: 4"
    )
    attention_factor: float | None = Field(
        None, gt=0, description="yarn: factor of cos and sin; null: 0.1 ln(factor) + 1"
    )
    beta_fast: float | None = Field(
        None, gt=0, description="yarn: frequencies of more periods in original_max_seq_len are kept; null: 32"
    )
    beta_slow: float | None = Field(
        None, gt=0, description="yarn: frequencies of fewer periods are divided by factor; null: 1"
    )
    truncate: bool | None = Field(
        None, description="yarn: round the two limits to whole frequencies, outwards; null: true"
    )

    @model_validator(mode="after")
    def _keys_belong_to_the_kind(self) -> Self:
        keys = {
            "linear": (),
            "llama3": ("original_max_seq_len", "low_freq_factor", "high_freq_factor"),
            "yarn": ("original_max_seq_len", "attention_factor", "beta_fast", "beta_slow", "truncate"),
        }[self.kind]
        for key in type(self).model_fields:
            if key not in ("kind", "factor", *keys) and getattr(self, key) is not None:
                raise ValueError(f"model.rope_scaling.{key} is not for model.rope_scaling.kind={self.kind}")
        if "original_max_seq_len" in keys and self.original_max_seq_len is None:
            raise ValueError(f"model.rope_scaling.kind={self.kind} needs model.rope_scaling.original_max_seq_len")
        low, high = self.low_freq_factor or 1.0, self.high_freq_factor or 4.0
        if self.kind == "llama3" and low >= high:
            raise ValueError(
                f"model.rope_scaling.low_freq_factor {low:g} is not below model.rope_scaling.high_freq_factor {high:g}"
            )
        return self


class ModelConfig(Section):
    """A Llama-family decoder: pre-RMSNorm, RoPE, SwiGLU, grouped-query attention; no dropout."""

    # The upper bounds are far beyond any model, and small enough that no product of sizes overflows 64 bits.
    n_layers: int = Field(ge=1, le=1_000, description="number of transformer blocks")
    d_model: int = Field(ge=16, le=2**20, description="width of the residual stream: the size of each token's vector")
    n_heads: int = Field(ge=1, le=2**16, description="number of query heads; divides d_model")
    n_kv_heads: int = Field(
        ge=1,
        le=2**16,
        description="number of key and value heads; divides n_heads; fewer heads make a smaller KV cache",
    )
    head_dim: int | None = Field(
        None, ge=1, description="head dimension, a multiple of 16 up to 256; null: d_model / n_heads"
    )
    d_ff: int = Field(ge=1, le=2**22, description="inner width of the SwiGLU layer")
    vocab_size: int | None = Field(
        None, ge=2, le=2**24, description="number of tokens in the vocabulary; null: taken from the data"
    )
    embedding_rows: int | None = Field(
        None,
        ge=2,
        le=2**24,
        description="rows of the embedding and of the LM head if they are more than vocab_size, as in some imported "
        "models; the further ones are kept as they are, and take no part in the loss; null: vocab_size",
    )
    max_seq_len: int = Field(2048, ge=2, lt=2**31, description="longest sequence the model is meant for, in tokens")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the RoPE frequencies")
    rope_scaling: RopeScalingConfig | None = Field(
        None, description="frequencies of RoPE for longer sequences; null: plain RoPE"
    )
    sliding_window: int | None = Field(
        None,
        ge=1,
        lt=2**31,
        description="a token attends to itself and the tokens before it, this many in all; null: to all",
    )
    norm_eps: float = Field(1e-6, gt=0, description="added to the mean square in RMSNorm, against a division by zero")
    qk_norm: bool = Field(True, description="apply RMSNorm to each query head and key head, before RoPE")
    attention_bias: Literal["none", "qkv", "qkvo"] = Field(
        "none", description="biases of attention: of queries, keys and values (qkv), and also of its output (qkvo)"
    )
    tie_embeddings: bool = Field(False, description="use one matrix for the token embedding and for the output layer")

    @property
    def head_size(self) -> int:
        """`head_dim`, or what it is if it is null."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def rows(self) -> int:
        """The rows of the embedding and of the LM head, without padding. Raises ValueError if they are not known."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is null: take it from the data before building a model")
        return self.embedding_rows or self.vocab_size

    @field_validator("head_dim")
    @classmethod
    def _one_form(cls, head_dim: int | None, info: ValidationInfo) -> int | None:
        """Makes a stated default null, so that equal models have equal configs."""
        heads = head_dim and info.data.get("n_heads")
        return None if heads and head_dim * heads == info.data.get("d_model") else head_dim

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        # Checked first, because head_size below is a floor division.
        if self.d_model % self.n_heads:
            raise ValueError(f"model.d_model {self.d_model} is not a multiple of model.n_heads {self.n_heads}")
        stated = "model.d_model / model.n_heads =" if self.head_dim is None else "model.head_dim"
        if self.head_size % 16:
            raise ValueError(f"{stated} {self.head_size}: the head dimension must be a multiple of 16")
        if self.head_size > 256:
            raise ValueError(f"{stated} {self.head_size}: the head dimension may be at most 256")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"model.n_heads {self.n_heads} is not a multiple of model.n_kv_heads {self.n_kv_heads}")
        if self.rope_scaling is not None and self.rope_scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"model.rope_theta {self.rope_theta:g}: must be above 1 for model.rope_scaling.kind=yarn")
        return self

    @model_validator(mode="after")
    def _rows_for_all_tokens(self) -> Self:
        if self.embedding_rows is not None and self.embedding_rows < (self.vocab_size or 0):
            raise ValueError(
                f"model.embedding_rows {self.embedding_rows} is below model.vocab_size {self.vocab_size}: each token "
                "has a row"
            )
        return self

    @model_validator(mode="after")
    def _other_programs_have_it(self) -> Self:
        """Each checkpoint is a Hugging Face model, so its class must have this combination."""
        if self.attention_bias == "qkv" and self.qk_norm:
            raise ValueError(
                "model.attention_bias=qkv with model.qk_norm=true is no model of transformers, so it could not be "
                "exported: use model.qk_norm=false (Qwen2) or model.attention_bias=qkvo (Qwen3)"
            )
        if self.attention_bias == "qkvo" and self.sliding_window is not None and not self.qk_norm:
            raise ValueError(
                "model.attention_bias=qkvo with model.sliding_window and model.qk_norm=false is no model of "
                "transformers, so it could not be exported: use model.qk_norm=true (Qwen3), or "
                "model.attention_bias=qkv (Qwen2)"
            )
        return self


class SourceConfig(Section):
    """One part of a mixture of data sets."""

    path: DataPath = Field(description="a directory made by `llm prepare_data`, or its URL in an object store")
    weight: float = Field(
        gt=0, description="share of the sequences from this source, relative to the weights of the other sources"
    )


class StageConfig(Section):
    """A mixture for a later part of the run."""

    from_tokens: int = Field(
        gt=0, description="number of training tokens after which the stage begins, rounded up to whole steps"
    )
    sources: list[SourceConfig] = Field(
        min_length=1, max_length=64, description="the mixture from there to the next stage"
    )


class DataConfig(Section):
    """The shards to train on: either `path` or `sources`, and `stages` that replace them later in the run."""

    path: DataPath | None = Field(
        "data/shards",
        description="a directory made by `llm prepare_data`, or its URL in an object store, such as s3://bucket/shards",
    )
    sources: list[SourceConfig] | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="several such directories, mixed by their weights; it replaces path",
    )
    stages: list[StageConfig] = Field(
        default_factory=list, max_length=64, description="other mixtures for later parts of the run"
    )
    seq_len: int | None = Field(
        None,
        ge=2,
        lt=2**31,
        description="tokens per training sequence; null: the --seq_len that the shards were prepared with",
    )
    cache: FilePath = Field(
        "data/cache",
        description="folder that data of an object store are copied into before the first step, once on each node",
    )
    retry_minutes: float = Field(
        10.0, ge=0, description="how long an object store that fails is asked again before the run ends"
    )
    loader_threads: int = Field(2, ge=1, le=64, description="threads per process that read shards")

    @property
    def mixtures(self) -> list[tuple[int, list[SourceConfig]]]:
        """Returns (from_tokens, sources) of each stage; the first one begins at token 0."""
        first = self.sources
        if first is None:
            assert self.path is not None
            first = [SourceConfig(path=self.path, weight=1.0)]
        return [(0, first), *((stage.from_tokens, stage.sources) for stage in self.stages)]

    @property
    def paths(self) -> list[str]:
        """Returns the directories of all stages; one in several stages is listed several times."""
        return [source.path for _, sources in self.mixtures for source in sources]

    @model_validator(mode="before")
    @classmethod
    def _path_gives_way(cls, tree: Any) -> Any:
        """Drops the default path if there are sources."""
        # Before validation, while a path that the user has set can still be told from the default.
        return {"path": None, **tree} if isinstance(tree, dict) and tree.get("sources") is not None else tree

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.sources is None):
            raise ValueError(
                "data.path and data.sources: name exactly one of them (data.path=null or data.sources=null drops one)"
            )
        return self

    @model_validator(mode="after")
    def _stages_follow_each_other(self) -> Self:
        begins = [stage.from_tokens for stage in self.stages]
        for number, (earlier, later) in enumerate(pairwise(begins), 1):
            if later <= earlier:
                raise ValueError(
                    f"data.stages.{number}.from_tokens {later} is not above the {earlier} of the stage before it"
                )
        return self


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019), alone or with Muon (Jordan et al. 2024). Norms and embeddings get no decay.

    A null follows from the model and the text by a rule of llm/training/rules.py, at the first start of a run.
    """

    kind: Literal["adamw", "muon"] | None = Field(
        None,
        description="muon: Muon for the matrices inside blocks and AdamW for the rest, not at zero_stage 3; "
        "null: by rule",
    )
    lr: float | None = Field(None, gt=0, description="peak learning rate of AdamW; null: by rule")
    muon_lr: float | None = Field(
        None, gt=0, description="peak learning rate of the matrices that Muon trains; null: by rule"
    )
    embed_lr: float | None = Field(
        None, gt=0, description="peak learning rate of the embedding; null: by rule, from lr"
    )
    head_lr: float | None = Field(
        None, gt=0, description="peak learning rate of an untied LM head; null: by rule, from lr"
    )
    norm_lr: float | None = Field(None, gt=0, description="peak learning rate of the norms; null: by rule, from lr")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="decay rate of Muon's momentum")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay rate of AdamW's first moment, the mean of the gradient")
    beta2: float | None = Field(
        None, ge=0, lt=1, description="decay rate of AdamW's second moment, of the squared gradient; null: by rule"
    )
    eps: float = Field(1e-8, gt=0, description="added to the root of AdamW's second moment, against a division by zero")
    weight_decay: float | None = Field(
        None, ge=0, description="decoupled weight decay of the matrices inside blocks and of the LM head; null: by rule"
    )
    grad_clip: float = Field(
        1.0, ge=0, description="a gradient whose global norm is larger is scaled down to this norm; 0: no clipping"
    )

    @property
    def peak_lr(self) -> float:
        """`lr` of a resolved config."""
        return _settled(self.lr)

    @model_validator(mode="after")
    def _muon_lr_belongs_to_muon(self) -> Self:
        if self.muon_lr is not None and self.kind == "adamw":
            raise ValueError("optimizer.muon_lr is for optimizer.kind=muon, not adamw")
        return self


class ScheduleConfig(Section):
    """The learning rate: a linear warmup to the peak rates, then a decay that ends at train.total_tokens."""

    kind: Literal["cosine", "linear", "wsd"] = Field(
        "linear", description="shape of the decay; wsd: constant until the last decay_tokens, then linear"
    )
    warmup_tokens: int | None = Field(None, ge=0, description="tokens of the linear warmup; null: by rule")
    decay_tokens: int | None = Field(
        None, ge=0, description="tokens of the decay with kind=wsd; null: a fifth of train.total_tokens"
    )
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="last learning rate, as a fraction of the peak")

    @property
    def warmup(self) -> int:
        """`warmup_tokens` of a resolved config."""
        return _settled(self.warmup_tokens)

    @model_validator(mode="after")
    def _decay_belongs_to_wsd(self) -> Self:
        if self.decay_tokens is not None and self.kind != "wsd":
            raise ValueError(f"schedule.decay_tokens is for schedule.kind=wsd, not {self.kind}")
        return self


class TrainConfig(Section):
    """The run: its length, its batch, how it computes, and what it reports."""

    total_tokens: int | None = Field(
        None, ge=1, lt=2**62, description="tokens to train on; the run and its schedule end there; null: by rule"
    )
    global_batch_tokens: int | None = Field(
        None,
        ge=1,
        le=2**32,
        description="tokens per optimizer step over all processes; a multiple of the sequence length; null: by rule",
    )
    micro_batch: int | None = Field(
        None,
        ge=1,
        le=2**20,
        description="sequences per forward pass of a process; null: chosen at the start of the run, on a GPU by the "
        "predicted memory of a step",
    )
    seed: int = Field(1337, ge=0, lt=2**63, description="seed of the initial weights and of the order of the data")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one, else the CPU")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="auto: bf16 with fp32 master weights if the device multiplies bf16, else fp16 with them on a GPU "
        "with tensor cores (not at zero_stage=0), else fp32; fp16: scaled loss",
    )
    activation_checkpointing: ActivationCheckpointing = Field(
        "none",
        description="activations that the backward pass computes again, to save memory: none; full: all of each block; "
        "selective: all but the results of matrix products and attention",
    )
    same_bits: bool = Field(
        False,
        description="the same bits of losses, weights and moments on 1, 2, 4, ... processes with the same micro_batch, "
        "at zero_stage 0 and 1",
    )
    max_minutes: float | None = Field(None, gt=0, description="save and stop after this many minutes; null: no limit")
    hang_minutes: float = Field(
        10.0,
        gt=0,
        description="with several processes: end the run if one of them gives no sign of life for this many minutes",
    )
    z_loss: float = Field(
        0.0, ge=0, description="weight of logsumexp(logits)^2 in the loss, to keep logits small; 1e-4 is usual"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="after a loss or gradient that is not finite: end the run, or skip the step"
    )
    max_skips: int = Field(
        10, ge=0, description="with on_nonfinite=skip: end the run if more steps than this were skipped"
    )
    log_every_steps: int = Field(10, ge=1, description="steps between two lines of metrics.jsonl")
    eval_every_steps: int = Field(
        500, ge=1, description="steps between two validations; there is also one at the start and one at the end"
    )
    eval_tokens: int | None = Field(None, ge=1, description="tokens per validation; null: the whole validation split")
    stop_patience: int | None = Field(
        None,
        ge=1,
        description="end the run after this many validations in a row without a new lowest loss; null: never",
    )
    eval_tasks: list[str] = Field(
        default_factory=list,
        max_length=64,
        description="tasks of lm-evaluation-harness on which the run's model is scored, as llm eval --tasks does",
    )
    eval_tasks_every_steps: int | None = Field(
        None,
        ge=1,
        description="steps between two scorings by train.eval_tasks; there is also one at the end; null: only that",
    )
    eval_tasks_path: FilePath | None = Field(
        None, description="a folder with the .yaml files of your own tasks for train.eval_tasks; null: none"
    )
    eval_tasks_limit: int | None = Field(None, ge=1, description="documents per task of train.eval_tasks; null: all")
    sample_prompts: list[str] = Field(
        default_factory=list, max_length=16, description="prompts that the model continues at each validation"
    )
    monitor: list[Literal["tensorboard", "wandb", "csv"]] = Field(
        default_factory=list,
        description="where metrics are also written, by DeepSpeed's monitors; metrics.jsonl is always written",
    )
    init_from: FilePath | None = Field(
        None, description="a checkpoint to take the initial weights from; nothing else is taken from it"
    )
    force: bool = Field(False, description="train even with very many epochs or hours, which is otherwise an error")

    @property
    def horizon(self) -> int:
        """`total_tokens` of a resolved config."""
        return _settled(self.total_tokens)

    @property
    def batch(self) -> int:
        """`global_batch_tokens` of a resolved config."""
        return _settled(self.global_batch_tokens)

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _once_a_switch(cls, value: Any) -> Any:
        """Older configs and checkpoints, with true or false, keep their meaning."""
        # Before validation, because true and false are no values of the Literal.
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class CheckpointConfig(Section):
    """When checkpoints are written, where, and which are kept."""

    dir: FilePath = Field("artifacts/checkpoints", description="the run's folder: checkpoints, metrics and status")
    every_steps: int = Field(
        1000, ge=1, description="steps between two checkpoints; there is also one at the end of the run"
    )
    keep_last: int = Field(
        3, ge=1, description="number of newest checkpoints to keep; older ones are deleted, except by the next two keys"
    )
    keep_every_steps: int | None = Field(
        None, ge=1, description="keep each checkpoint whose step is a multiple of this; null: none"
    )
    keep_best: bool = Field(
        True, description="keep the checkpoint with the lowest validation loss, of those saved at a validation"
    )
    after_save: str | None = Field(
        None,
        min_length=1,
        description="a command for the shell, run in the background after each completed save, with the checkpoint's "
        "folder in the variable LLM_CHECKPOINT; null: none",
    )
    gather_bytes: int = Field(
        64_000_000_000,
        ge=0,
        description="rank 0 alone writes a checkpoint of up to this size (12 bytes per parameter); all ranks together "
        "write a larger one",
    )


class DeepSpeedConfig(Section):
    """How DeepSpeed divides the state of a run among the processes."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="what ZeRO partitions among processes: 0: nothing, 1: optimizer state, 2: also gradients, "
        "3: also parameters",
    )
    offload: Literal["none", "cpu"] = Field(
        "none",
        description="cpu: keep fp32 master weights and moments in host memory, update them there; not at zero_stage=0",
    )
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="more DeepSpeed settings, merged into the JSON that is generated for DeepSpeed",
    )

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
            # Only DeepSpeed validates `extra`, so it may be of any type.
            if isinstance(zero, dict) and key in zero:
                taken.append(f"deepspeed.extra.zero_optimization.{key} is set by deepspeed.{setting}")
        if taken:
            raise ValueError("; ".join(taken))
        return self


class Config(Section):
    """A training run of LLM from scratch."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
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
        if self.train.stop_patience is not None and not self.checkpoint.keep_best:
            raise ValueError(
                "train.stop_patience ends a run for its best checkpoint, which checkpoint.keep_best=false deletes: "
                "use checkpoint.keep_best=true or train.stop_patience=null"
            )
        stage = self.deepspeed.zero_stage
        if self.train.same_bits and stage > 1:
            raise ValueError(
                f"train.same_bits=true does not train at deepspeed.zero_stage {stage} (it sums whole gradients): use "
                "deepspeed.zero_stage=1 or train.same_bits=false"
            )
        if self.train.same_bits and self.train.precision == "fp16":
            raise ValueError(
                "train.same_bits=true does not train with train.precision=fp16 (DeepSpeed scales its loss): use "
                "train.precision=bf16 or fp32, or train.same_bits=false"
            )
        if self.train.same_bits and self.deepspeed.offload == "cpu":
            raise ValueError(
                "train.same_bits=true does not train with deepspeed.offload=cpu (it has no separate masters): use "
                "deepspeed.offload=none or train.same_bits=false"
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
