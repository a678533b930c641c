"""The split into train and validation: by the hash of each document, or of few documents by their position.

`packing.held_out` decides for one document by its hash. See `prepare.prepare_data` for the rules.
"""

import math
from collections.abc import Callable

import numpy as np

from llm.data.manifest import ShardInfo
from llm.data.spool import COPY_TOKENS, Spool, Store
from llm.data.tokenizer import Tokenizer
from llm.errors import UserError

HASH_SPLIT_DOCUMENTS = 200
"""With as many documents, the split is by hash."""


def check_hash_split(shards: dict[str, tuple[ShardInfo, ...]], fraction: float, seq_len: int, names: str) -> None:
    """Raises UserError if a part of a split by hash has no sequence. names: of the inputs, in messages."""
    train, val = (sum(shard.tokens for shard in shards[part]) for part in ("train", "val"))
    train_documents, val_documents = (sum(shard.documents for shard in shards[part]) for part in ("train", "val"))
    total = train + val
    if val <= seq_len:
        # Twice the average need, and at least five documents: chance then rarely gives too few again.
        enough = max(2 * fraction, 2 * (seq_len + 1) / total, 5 / (train_documents + val_documents))
        # Rounded up, because a value rounded down could again be too small.
        way_out = f"raise --val_fraction to {math.ceil(enough * 1000) / 1000:g}" if enough < 0.5 else "use more text"
        raise UserError(
            f"{names}: --val_fraction {fraction:g} holds out {val_documents:,} documents with {val:,} of "
            f"{total:,} tokens, too few for one sequence of --seq_len {seq_len} + 1 tokens; "
            f"{way_out} or lower --seq_len"
        )
    if train <= seq_len:
        raise UserError(
            f"{names}: --val_fraction {fraction:g} leaves {train:,} of {total:,} tokens to train on, too few "
            f"for one sequence of --seq_len {seq_len} + 1 tokens; lower --val_fraction or --seq_len, or use more text"
        )


def split_by_position(
    store: Store, tokenizer: Tokenizer, fraction: float, seq_len: int, names: str, say: Callable[[str], object]
) -> None:
    """Writes the tokens before the cut to the train shards and the tokens after it to the validation shards.

    Raises UserError if a part would have no sequence.
    """
    spool, train, val = store.spool, store.train, store.val
    total = spool.length
    share = round(total * fraction)
    at = _place_to_cut(spool, tokenizer, total - max(share, seq_len + 1))
    inside = at > 0 and spool.read(at, at + 1)[0] != tokenizer.begin_mark  # of a document
    # The EOS of the first half of a divided document counts too.
    if at + inside <= seq_len:
        raise UserError(
            f"{names}: {total:,} tokens are too few for a sequence of --seq_len {seq_len} + 1 tokens to train on "
            f"and another for validation; use more text or lower --seq_len (to {max(2, total // 3)}, say)"
        )
    for tokens in spool.read_parts(0, at):
        train.append(tokens)
    # The document becomes two, and each of them needs BOS and EOS.
    if inside:
        train.append(np.array([tokenizer.eos_id], spool.dtype))
        val.append(np.array([tokenizer.begin_mark], spool.dtype))
    for tokens in spool.read_parts(at, total):
        val.append(tokens)
    why = "" if share > seq_len else f": one sequence, --val_fraction {fraction:g} would be less"
    say(
        f"fewer than {HASH_SPLIT_DOCUMENTS} documents, so validation is the end of the running text: the last "
        f"{val.tokens:,} of {total:,} tokens{why}"
    )


def _place_to_cut(spool: Spool, tokenizer: Tokenizer, at: int) -> int:
    """Returns the last place at or before `at` where a document begins or `blocks.cut` may cut, or 0."""
    # begin_mark may be one id above the vocabulary.
    pieces = [*tokenizer.piece_bytes(), b""]
    # -1, because BOS and EOS have no bytes and must not look like a character.
    first = np.array([piece[0] if piece else -1 for piece in pieces])
    last = np.array([piece[-1] if piece else -1 for piece in pieces])
    blank, newline = ord(" "), ord("\n")
    while at > 0:
        low = max(0, at - COPY_TOKENS)
        # One token more, because the token after `at` decides about the place `at`.
        tokens = spool.read(low, at + 1)
        before, after = tokens[:-1], tokens[1:]
        end, begin = last[before], first[after]
        # The places of `blocks.cut`, except at U+2581. Bytes are enough: in UTF-8 no other character
        # holds the byte of a blank or newline.
        safe = (end != blank) & (begin == blank) | (end == newline) & (begin != newline)
        places = np.flatnonzero(safe & (end >= 0) & (begin >= 0) | (after == tokenizer.begin_mark))
        if len(places):
            return low + 1 + int(places[-1])
        at = low
    return 0
