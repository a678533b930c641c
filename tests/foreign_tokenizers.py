"""Tokenizers of others, trained here in the styles that published models have. Each is a folder as on a model hub."""

import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llm.data.byte_level import byte_characters

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = GPT4.replace("{1,3}", "")
TEXT = [
    "The quick brown fox, it's 12345 times don't JUMP over 2024 lazy dogs.\n\n  def f(x):\n\treturn  x + 1\r\n",
    "naïve café 字字 the of and not <s> </s> <|endoftext|> 🎉 ,;:!? ... [a](b) {c} the fox the dogs the lines",
] * 20
BYTE_LEVEL = ("gpt2", "smollm2", "llama3", "qwen2")
STYLES = (*BYTE_LEVEL, "llama2", "llama2-v4", "tinyllama-spm", "unigram")


def make(style: str, folder: Path) -> Path:
    """Writes the folder of a tokenizer in a style: with tokenizer.json, or for tinyllama-spm tokenizer.model alone."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    generation: dict[str, Any] = {}
    if style in BYTE_LEVEL:
        library, config, generation = _byte_level(style)
    elif style == "unigram":
        library = _unigram()
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        _sentencepiece(folder)
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}
        config["added_tokens_decoder"] = {
            str(i): {"content": text, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
            for i, text in ((0, "<unk>"), (1, "<s>"), (2, "</s>"), (400, "<pad>"))
        }
        library = None if style == "tinyllama-spm" else _llama(folder, style)
    if library is not None:
        library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def _byte_level(style: str) -> tuple[Tokenizer, dict[str, Any], dict[str, Any]]:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    library = Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    config: dict[str, Any] = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    generation: dict[str, Any] = {}
    if style == "gpt2":  # its config names neither BOS nor EOS
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        config = {"model_max_length": 64, "tokenizer_class": "GPT2Tokenizer"}
        generation = {"bos_token_id": 0, "eos_token_id": 0}
    elif style == "smollm2":
        digits = pre_tokenizers.Digits(individual_digits=True)
        library.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        config["tokenizer_class"] = "GPT2Tokenizer"
    elif style == "llama3":
        specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
        library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(GPT4), "isolated"), plain])
        config = {"bos_token": specials[0], "eos_token": specials[1], "tokenizer_class": "PreTrainedTokenizerFast"}
        generation = {"bos_token_id": 0, "eos_token_id": [1, 2]}
    else:
        library.normalizer = normalizers.NFC()
        library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), plain])
        config = {"bos_token": None, "eos_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}
        config["extra_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
        generation = {"eos_token_id": [0, 2]}
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(TEXT, trainer)
    if style == "llama3":
        library.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
        )
    if style == "qwen2":
        library.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return library, config, generation


def _unigram() -> Tokenizer:
    library = Tokenizer(models.Unigram())
    library.normalizer = normalizers.NFKC()
    library.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    library.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(TEXT, trainer)
    return library


def _sentencepiece(folder: Path) -> None:
    def lines() -> Iterator[str]:
        for text in TEXT:
            yield from text.splitlines()

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=True,
        minloglevel=4,
    )
    (folder / "tokenizer.vocab").unlink()


def _llama(folder: Path, style: str) -> Tokenizer:
    """Llama 2's tokenizer.json, as transformers 4 converted it (llama2) or without `legacy: false` (llama2-v4)."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    known = {piece for i, piece in enumerate(pieces) if not model.is_byte(i) and not model.is_control(i)}
    merges = [
        (piece[:at], piece[at:])
        for _, piece in sorted(enumerate(pieces), key=lambda item: -model.get_score(item[0]))
        if piece in known
        for at in range(1, len(piece))
        if piece[:at] in known and piece[at:] in known
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    library = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return library


def make_ranks(folder: Path) -> Path:
    """The vocabulary of a byte-level tokenizer as tiktoken ranks."""
    tree = json.loads((make("llama3", folder) / "tokenizer.json").read_text())
    byte_of = {char: bytes([byte]) for byte, char in enumerate(byte_characters())}
    special = {token["content"] for token in tree["added_tokens"]}
    pieces = [piece for piece in tree["model"]["vocab"] if piece not in special]
    pieces.sort(key=tree["model"]["vocab"].__getitem__)
    return write_ranks(folder / "some.tiktoken", [b"".join(byte_of[char] for char in piece) for piece in pieces])


def write_ranks(path: Path, tokens: Sequence[bytes]) -> Path:
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))
    return path
