"""Writes our tokenizer in Hugging Face's format: tokenizer.json and tokenizer_config.json, for AutoTokenizer.

SentencePiece merges the neighbours whose union has the highest score; Hugging Face's BPE applies the first merge rule
that fits. Among equals, both take the leftmost. So each way to split a piece becomes a rule, in the order of the scores
of the pieces. Pieces contain plain blanks, text is not normalised or split before BPE, and characters that are not in
the vocabulary fall back to bytes.
"""

import json
from pathlib import Path
from typing import Any

import sentencepiece

from llm.data.tokenizer import MADE_FROM, Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json")


def write_files(tokenizer: Tokenizer, folder: Path, max_seq_len: int) -> None:
    """Writes FILES into a folder. The class named there uses tokenizer.json unchanged; LlamaTokenizer would not."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _piece(tokenizer, tokenizer.bos_id),
        "eos_token": _piece(tokenizer, tokenizer.eos_id),
        "model_max_length": max_seq_len,
        "split_special_tokens": True,  # "<s>" in a text is three ordinary characters
        # True would delete blanks before punctuation from decoded text.
        "clean_up_tokenization_spaces": False,
        MADE_FROM: "tokenizer.model",
    }
    for name, tree in zip(FILES, (_tokenizer_json(tokenizer), config), strict=True):
        (folder / name).write_text(json.dumps(tree, ensure_ascii=False, indent=1) + "\n", "utf-8")


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files["tokenizer.model"])
    # Bytes stay written as <0x0A>, which ByteFallback expects. In other pieces id_to_piece writes a blank as U+2581.
    pieces = [
        processor.id_to_piece(i) if processor.is_byte(i) or not raw else raw.decode()
        for i, raw in enumerate(tokenizer.piece_bytes())
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    # A merge never gives a byte or control token.
    learned = [i for i, raw in enumerate(tokenizer.piece_bytes()) if raw and not processor.is_byte(i)]
    plain = {pieces[i] for i in learned}
    merges = [
        [pieces[i][:at], pieces[i][at:]]
        # sorted is stable, also with reverse, so pieces of equal score stay in the order of their ids.
        for i in sorted(learned, key=processor.get_score, reverse=True)
        for at in range(1, len(pieces[i]))
        if pieces[i][:at] in plain and pieces[i][at:] in plain
    ]
    bos = pieces[tokenizer.bos_id]
    special = [i for i in range(len(pieces)) if processor.is_control(i) or processor.is_unknown(i)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": pieces[i], **flags} for i in special],
        "normalizer": None,
        "pre_tokenizer": None,
        # In training every document begins with BOS.
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        # ByteFallback joins a character's byte tokens first; Fuse then joins the pieces without blanks between them.
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            # There is no unknown text, because each byte is a token.
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            # True would encode a text that equals a piece as that piece, without the merges.
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _piece(tokenizer: Tokenizer, token: int) -> str:
    piece: str = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files["tokenizer.model"]).id_to_piece(token)
    return piece
