"""Completes the settings that a config leaves open: from the data, the checkpoint, the rules, or by assumption.

Training, `llm plan`, `llm profile` and `llm doctor` use it. It does not import deepspeed, and torch only for the rules.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.config import Config, DataConfig
from llm.config_file import parse_config
from llm.config_text import is_url
from llm.data.manifest import MANIFEST_NAME
from llm.data.mixture import PERIOD, Mixture
from llm.data.object_store import read_data
from llm.errors import UserError

if TYPE_CHECKING:
    from llm.training.rules import Followed

ASSUMED_VOCAB_SIZE = 32_000
"""The vocabulary size if the config has none and the data do not exist."""


def check_data(config: Config, resume: str = "auto") -> Mixture:
    """Returns the data of a run, and checks what it reads.

    Called also before anything imports torch, which takes seconds. `train` itself checks everything.

    resume: see `llm.training.train.train`.

    Raises UserError if the data or a named checkpoint are missing, or if the config of a new run does not fit the data.
    """
    for path in (config.train.init_from, resume):
        if path not in (None, "auto", "never") and not Path(path).exists():
            raise UserError(f"{path}: no such checkpoint; `llm train` writes them under checkpoint.dir")
    data = read_data(config.data)
    # A resumed run takes settings from its checkpoint.
    if resume in ("auto", "never") and not any(Path(config.checkpoint.dir).glob("step-*")):
        _fit(config, data)
    return data


def find_data(config: DataConfig) -> Mixture | None:
    """As `read_data`, but returns None if a manifest is missing, because the data have not been prepared yet."""
    return read_data(config) if missing_data(config) is None else None


def missing_data(config: DataConfig) -> str | None:
    """Returns the first directory in the config without a manifest; None: all have one. A URL without one is wrong."""
    folders = (path for path in config.paths if not is_url(path))
    return next((path for path in folders if not (Path(path) / MANIFEST_NAME).exists()), None)


KEPT: dict[str, tuple[str, ...]] = {
    "model": (),
    "optimizer": (),
    "schedule": (),
    "train": ("total_tokens", "global_batch_tokens", "z_loss", "same_bits"),
}
"""{section: keys} that a resumed run takes from its checkpoint unless the config states them; no keys: all."""


def as_begun(config: Config, saved: Config, source: Path) -> Config:
    """Returns the config of a resumed run: settings of KEPT that it does not state are as in `saved`, its checkpoint's.

    So values from rules, or from the defaults of the release that started the run, never change. Raises UserError if
    the combination is not valid.
    """
    tree: dict[str, Any] = config.model_dump()
    for section, keys in KEPT.items():
        now, then = getattr(config, section), getattr(saved, section)
        if section == "train" and saved.train.same_bits:
            keys = (*keys, "micro_batch")  # with another one the sums would be others
        for key in keys or tree[section]:
            if key not in now.model_fields_set or getattr(now, key) is None:
                tree[section][key] = getattr(then, key)
    if tree["optimizer"]["kind"] == "adamw" and config.optimizer.muon_lr is None:
        # That the kind is another than the checkpoint's is told where the two are compared.
        tree["optimizer"]["muon_lr"] = None
    return parse_config(tree, f"{source} with this config")


def resolve(config: Config, data: Mixture | None, *, begun: bool = False) -> "tuple[Config, list[Followed]]":
    """Fills in what the config leaves open: model.vocab_size and data.seq_len from the data, the rest by rules.

    data: None if they do not exist. Then the vocabulary is ASSUMED_VOCAB_SIZE and a sequence has the greatest length of
        the model, unless the config states them.
    begun: whether the run has already started, so that no rule applies (`as_begun`).

    Returns the config, and the settings that followed from rules. Raises UserError if the config and the data do not
    fit together.
    """
    config = _fit(config, data)
    if begun:
        return config, []
    # Imported here, because the rules count a model's parameters with torch.
    from llm.training.rules import follow

    assert config.data.seq_len is not None
    return follow(config, None if data is None else epoch_tokens(data, config.data.seq_len))


def _fit(config: Config, data: Mixture | None) -> Config:
    """Fills in model.vocab_size and data.seq_len."""
    vocab_size, seq_len = config.model.vocab_size, config.data.seq_len
    if data is None:
        vocab_size, seq_len = vocab_size or ASSUMED_VOCAB_SIZE, seq_len or config.model.max_seq_len
    else:
        vocab_size, seq_len = _vocab_size(vocab_size, data), _seq_len(seq_len, data, config.model.max_seq_len)
    batch = config.train.global_batch_tokens
    # Only here, because seq_len may come from the data.
    if batch is not None and batch % seq_len:
        nearest = max(1, round(batch / seq_len)) * seq_len
        raise UserError(
            f"train.global_batch_tokens {batch} is not a multiple of the sequence length {seq_len}; the nearest is "
            f"{nearest}"
        )
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"vocab_size": vocab_size}),
            "data": config.data.model_copy(update={"seq_len": seq_len}),
        }
    )


def epoch_tokens(data: Mixture, seq_len: int) -> int:
    """Returns the tokens after which the first source of a mixture, in its first stage, has been read once."""
    shares = zip(data.sources, data.stages[0].counts, strict=True)
    return min(source.sequences("train", seq_len) * PERIOD // count for source, count in shares if count) * seq_len


def _vocab_size(stated: int | None, data: Mixture) -> int:
    # `mix_stages` rejects sources with different tokenizers, so all have the size of the first.
    found = data.sources[0].vocab_size
    if stated is not None and stated != found:
        raise UserError(
            f"model.vocab_size {stated} does not match the {found} of {data.name}; leave it null to take the data's"
        )
    return found


def _seq_len(stated: int | None, data: Mixture, longest: int) -> int:
    prepared = {source.seq_len for source in data.sources}
    if stated is None and len(prepared) > 1:
        raise UserError(
            f"data.sources were prepared for sequences of {sorted(prepared)} tokens; set data.seq_len to one length"
        )
    seq_len = stated or prepared.pop()
    if seq_len > longest:
        raise UserError(
            f"{data.name} was prepared for sequences of {seq_len} tokens, above model.max_seq_len {longest}; set "
            f"data.seq_len={longest} or raise model.max_seq_len"
        )
    return seq_len
