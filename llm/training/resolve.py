"""Which vocabulary and sequence length a run has: the config's own, those of its data, or assumed ones.

Training, `llm plan`, `llm profile` and `llm doctor` all ask here. Nothing of this imports deepspeed.
"""

from pathlib import Path

from llm.config import Config, DataConfig
from llm.data.manifest import MANIFEST_NAME, read_manifest
from llm.data.mixture import Mixture, mix_stages
from llm.errors import UserError

ASSUMED_VOCAB_SIZE = 32_000
"""The vocabulary size where neither the config states one nor the data exist."""


def read_data(config: DataConfig) -> Mixture:
    """Reads the manifest of every directory that the config names. Raises UserError where one is missing."""
    return mix_stages(
        [
            (from_tokens, [read_manifest(source.path) for source in sources], [source.weight for source in sources])
            for from_tokens, sources in config.mixtures
        ]
    )


def find_data(config: DataConfig) -> Mixture | None:
    """As `read_data`, but returns None where a manifest is missing: the data have not been prepared yet."""
    return read_data(config) if missing_data(config) is None else None


def missing_data(config: DataConfig) -> str | None:
    """Returns the first directory without a manifest among those that the config names; None: there is none."""
    return next((path for path in config.paths if not (Path(path) / MANIFEST_NAME).exists()), None)


def resolve(config: Config, data: Mixture | None) -> Config:
    """Fills in model.vocab_size and data.seq_len.

    data: None where they do not exist: the vocabulary is then ASSUMED_VOCAB_SIZE and a sequence as long as the model
        allows, unless the config states them.

    Raises UserError where the config and the data do not fit together.
    """
    vocab_size, seq_len = config.model.vocab_size, config.data.seq_len
    if data is None:
        vocab_size, seq_len = vocab_size or ASSUMED_VOCAB_SIZE, seq_len or config.model.max_seq_len
    else:
        vocab_size, seq_len = _vocab_size(vocab_size, data), _seq_len(seq_len, data, config.model.max_seq_len)
    # Only here, because seq_len may come from the data.
    if config.train.global_batch_tokens % seq_len:
        nearest = max(1, round(config.train.global_batch_tokens / seq_len)) * seq_len
        raise UserError(
            f"train.global_batch_tokens {config.train.global_batch_tokens} is not a multiple of the sequence length "
            f"{seq_len}; the nearest is {nearest}"
        )
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"vocab_size": vocab_size}),
            "data": config.data.model_copy(update={"seq_len": seq_len}),
        }
    )


def _vocab_size(stated: int | None, data: Mixture) -> int:
    # `mix_stages` refuses sources of different tokenizers, so the first one's size is that of all.
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
