"""Writes a tokenizer into a GGUF file: SentencePiece models, and byte-level BPE with a split that llama.cpp knows."""

import json
from typing import Any

from llm.data.byte_level import GPT4_SPLIT, GPT4O_SPLIT, QWEN_SPLIT
from llm.data.library_tokenizer import TEMPLATE, LibraryTokenizer
from llm.data.sentencepiece_tokenizer import load_model
from llm.data.tokenizer import Tokenizer
from llm.errors import UserError


def add_tokenizer(writer: Any, tokenizer: Tokenizer, rows: int) -> None:
    """Adds the tokens, one for each of the model's rows, and the ids of BOS and EOS.

    Raises UserError for a tokenizer that llama.cpp does not have.
    """
    if isinstance(tokenizer, LibraryTokenizer) and tokenizer.kind == "byte-level BPE":
        _add_byte_level(writer, tokenizer, rows)
    elif "tokenizer.model" in tokenizer.files:
        _add_sentencepiece(writer, tokenizer, rows)
    else:
        raise UserError(f"{tokenizer.path}: --format gguf writes SentencePiece models and byte-level BPE; use hf")
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(True)
    if template := _chat_template(tokenizer):
        writer.add_chat_template(template)


def _chat_template(tokenizer: Tokenizer) -> str | None:
    if TEMPLATE in tokenizer.files:
        return tokenizer.files[TEMPLATE].decode()
    template = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}")).get("chat_template")
    return template if isinstance(template, str) else None


def _add_sentencepiece(writer: Any, tokenizer: Tokenizer, rows: int) -> None:
    import gguf

    processor = load_model(tokenizer.files["tokenizer.model"], tokenizer.path)
    kinds = gguf.TokenType
    pieces, scores, types = [], [], []
    for i in range(processor.get_piece_size()):
        pieces.append(processor.id_to_piece(i).encode())
        scores.append(processor.get_score(i))
        types.append(
            kinds.UNKNOWN
            if processor.is_unknown(i)
            else kinds.CONTROL
            if processor.is_control(i)
            else kinds.BYTE
            if processor.is_byte(i)
            else kinds.NORMAL
        )
    if kinds.BYTE not in types:
        raise UserError(f"{tokenizer.path}: --format gguf: llama.cpp needs byte fallback, which it lacks; use hf")
    # Tokens that a Hugging Face folder adds.
    for token in tokenizer.piece_bytes()[len(pieces) :]:
        pieces.append(token or f"[PAD{len(pieces)}]".encode())
        scores.append(0.0)
        types.append(kinds.USER_DEFINED if token else kinds.UNUSED)
    # llama.cpp takes a token for each row of the embedding.
    unused = range(len(pieces), rows)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces + [f"[PAD{i}]".encode() for i in unused])
    writer.add_token_scores(scores + [0.0 for _ in unused])
    writer.add_token_types(types + [kinds.UNUSED for _ in unused])
    # By default llama.cpp puts a blank before each text, as Llama's tokenizer does; ours does not.
    writer.add_add_space_prefix(tokenizer.prefix_bytes == 1)
    writer.add_remove_extra_whitespaces(False)


def _add_byte_level(writer: Any, tokenizer: LibraryTokenizer, rows: int) -> None:
    import gguf

    tree = tokenizer.tree()
    split = _split(tree)
    if split is None:
        raise UserError(f"{tokenizer.path}: --format gguf: llama.cpp has no name for how it splits text; use hf")
    model, kinds = tree["model"], gguf.TokenType
    pieces = [f"[PAD{i}]" for i in range(rows)]
    types = [kinds.UNUSED] * rows
    for piece, number in model["vocab"].items():
        pieces[number], types[number] = piece, kinds.NORMAL
    for token in tree["added_tokens"]:
        pieces[token["id"]] = token["content"]
        types[token["id"]] = kinds.CONTROL if token["special"] else kinds.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([piece.encode() for piece in pieces])
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])


def _split(tree: dict[str, Any]) -> str | None:
    """Returns llama.cpp's name of the way to split text; None if it has none."""
    step = tree["pre_tokenizer"]
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    kinds = [part["type"] for part in steps]
    if steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if steps[-1].get("use_regex", True):
        one_digit = kinds[:-1] == ["Digits"] and steps[0]["individual_digits"]
        return "gpt-2" if len(steps) == 1 else "smollm" if one_digit else None
    # Llama 3 takes a part of the split text that is a token as that token, without merging.
    gpt4 = "llama-bpe" if tree["model"].get("ignore_merges") else "dbrx"
    names = {QWEN_SPLIT: "qwen2", GPT4_SPLIT: gpt4, GPT4O_SPLIT: "gpt-4o"}
    return names.get(steps[0].get("pattern", {}).get("Regex", "")) if kinds == ["Split", "ByteLevel"] else None
