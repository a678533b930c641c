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
COMPLETION_TEMPLATE = """{#- Of a base model, which has no format of chats: it continues the text of one message. -#}
{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}
{{- raise_exception('This is a base model: it continues the text of one user message. For a chat, set a chat template '
  + 'and fine-tune the model with it.') -}}
{%- endif -%}
{{- bos_token + messages[0]['content'] -}}
"""
"""For programs that ask every model for a chat. Without a template, some of them take that of another model."""


def write_files(tokenizer: Tokenizer, folder: Path, max_seq_len: int) -> None:
    """Writes FILES into a folder. The class named there uses tokenizer.json unchanged; LlamaTokenizer would not."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _piece(tokenizer, tokenizer.bos_id),
        "eos_token": _piece(tokenizer, tokenizer.eos_id),
        "unk_token": _piece(tokenizer, 0),
        # <unk>, because no text has it. Trainers give padding no loss; with EOS for it, no model would learn to stop.
        "pad_token": _piece(tokenizer, 0),
        "padding_side": "left",  # a batch of prompts is continued at its end
        "model_max_length": max_seq_len,
        # transformers 4 would also make token_type_ids, which its generate refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        "add_prefix_space": False,  # for llama.cpp's converter
        # True would delete blanks before punctuation from decoded text.
        "clean_up_tokenization_spaces": False,
        "chat_template": COMPLETION_TEMPLATE,
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
