"""`llm generate`: continues prompts and shows the text while it grows."""

import codecs
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

from llm.data.tokenizer import Tokenizer
from llm.display import Display
from llm.errors import UserError, visible
from llm.inference.decode import check_fit, generate_batch
from llm.inference.prompts import check_text, read_prompts
from llm.inference.sampling import Sampling
from llm.model.checkpoint import load_model
from llm.model.transformer import Transformer
from llm.world import DTYPES, oom_as_user_error, pick_device

TEMPERATURE = 0.8


def generate(
    ckpt: str | os.PathLike[str],
    *,
    prompt: str | None = None,
    prompts: str | None = None,
    tok: str | os.PathLike[str] | None = None,
    max_new_tokens: int = 100,
    num_samples: int = 1,
    batch_size: int = 16,
    stop: Sequence[str] = (),
    temperature: float = TEMPERATURE,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    precision: str = "fp32",
    show: bool = False,
) -> dict[str, Any]:
    """Continues prompts with the model of a checkpoint.

    Args:
        ckpt: a checkpoint, or a run's folder.
        prompt, prompts: one text, or a file with one prompt per line, as for `read_prompts`.
        tok: the tokenizer; it must be the checkpoint's own, which is the default.
        num_samples: continuations per prompt; sample n uses seed + n, independent of the rest of its batch.
        batch_size: continuations in one batch.
        stop: texts before which a continuation ends.
        temperature, top_k, top_p, min_p, repetition_penalty, seed: see `sampling.Sampling`.
        device: "auto", "cpu" or "cuda"; precision: "fp32" or "bf16".
        show: write to stdout: a single continuation while it grows, several one after another.

    Returns text (the continuation of the first prompt), tokens (the number of generated tokens), tokens_per_second
    (prefill included), prefill_seconds, decode_seconds, and completions: the fields of each Completion, ordered by
    prompt, then sample. Raises UserError for invalid options, unusable files and prompts that are too long.
    """
    sampling = Sampling(
        repetition_penalty=repetition_penalty,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
    )
    _check_counts(num_samples=num_samples, batch_size=batch_size, max_new_tokens=max_new_tokens)
    _check_stop(stop)
    # Prompts are checked before the model is loaded, which takes far longer.
    texts = read_prompts(prompt, prompts)
    for number, text in enumerate(texts, 1):
        check_text(text, "the prompt" if len(texts) == 1 else f"prompt {number}")
    model, tokenizer = load_model(ckpt, pick_device(device), DTYPES[precision], tok=tok)

    completions = [Completion(text, sample) for text, sample in product(texts, range(num_samples))]
    # A dict, because the samples of a prompt share its ids.
    encoded = {text: [tokenizer.bos_id, *tokenizer.encode(text)] for text in texts}
    # All prompts are checked before the first batch, so that a long one at the end wastes no work.
    check_fit(model, [encoded[text] for text in texts])
    timing = Timing()
    alone = len(completions) == 1
    # At most, because a continuation may end with EOS.
    longest = max(1, min(max_new_tokens, model.config.max_seq_len - min(map(len, encoded.values()))))
    # A single text shows its own progress.
    display = Display("generating", len(completions) * longest, silent=show and alone)
    for start in range(0, len(completions), batch_size):
        batch = completions[start : start + batch_size]
        if show and alone:
            _write(batch[0].prompt)
        ids = [encoded[completion.prompt] for completion in batch]

        def grew(length: int, start: int = start, size: int = len(batch)) -> None:
            display.update(start * longest + size * length)

        # The bar is gone while the texts are written: both may be on the same terminal.
        with oom_as_user_error("lower --batch_size"), display:
            for grown in _continue(model, tokenizer, batch, ids, max_new_tokens, stop, sampling, timing, grew):
                if show and alone:
                    _write(grown)
        if show and not alone:
            for number, completion in enumerate(batch, start):
                # Not by its text: equal prompts have numbers of their own.
                heading = f"=== prompt {number // num_samples + 1}, sample {completion.sample + 1}"
                _write(f"{heading}\n{completion.prompt}{completion.text}\n")
    if show and alone:
        _write("\n")
    _report_full_contexts(completions, model, max_new_tokens)
    tokens = sum(completion.tokens for completion in completions)
    return {
        "text": completions[0].text,
        "tokens": tokens,
        "tokens_per_second": tokens / (timing.prefill_seconds + timing.decode_seconds),
        **asdict(timing),
        "completions": [asdict(completion) for completion in completions],
    }


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    sampling: Sampling,
) -> Iterator[str]:
    """Returns an iterator over the pieces of the text that continues a prompt, each computed when it is asked for.

    The pieces hold whole characters. The arguments are those of `generate`. The call itself raises the errors that do
    not need the model.
    """
    _check_counts(max_new_tokens=max_new_tokens)
    _check_stop(stop)
    check_text(prompt, "the prompt")
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    check_fit(model, [ids])
    completion = Completion(prompt, sample=0)
    pieces = _continue(model, tokenizer, [completion], [ids], max_new_tokens, stop, sampling, Timing())
    return filter(None, pieces)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")


def _check_stop(stop: Sequence[str]) -> None:
    if "" in stop:
        raise UserError("--stop: an empty text would stop everything; leave it out")


@dataclass
class Completion:
    """One continuation of one prompt."""

    prompt: str
    sample: int
    text: str = ""
    """The continuation, without the stop text that ended it."""
    finish: str = ""
    """Why it ended: "eos", "stop" (a stop text), "length" (max_new_tokens) or "context" (model.max_seq_len)."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each token in nats, before temperature and the other options."""

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


@dataclass
class Timing:
    """Wall-clock seconds; prefill ends with the first token."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


def _continue(
    model: Transformer,
    tokenizer: Tokenizer,
    completions: Sequence[Completion],
    ids: Sequence[list[int]],
    max_new_tokens: int,
    stop: Sequence[str],
    sampling: Sampling,
    timing: Timing,
    grew: Callable[[int], None] = lambda length: None,
) -> Iterator[str]:
    """Fills in the completions; yields the parts of the first completion's text as it grows.

    grew: gets the tokens of the longest completion, whenever there is one more.
    """
    finished: set[int] = set()
    texts = [TextStream(stop) for _ in completions]
    streams = [completion.sample for completion in completions]
    started = first_token = time.perf_counter()
    length = 0
    for token in generate_batch(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_ids=tokenizer.eos_ids,
        streams=streams,
        finished=finished,
    ):
        # The first token comes from the prompts' pass, later ones from steps.
        if first_token == started:
            first_token = time.perf_counter()
        completion, text = completions[token.sequence], texts[token.sequence]
        completion.token_ids.append(token.id)
        completion.logprobs.append(token.logprob)
        if completion.tokens > length:
            length = completion.tokens
            grew(length)
        shown = text.add(tokenizer.decode_bytes([token.id]))
        completion.text += shown
        if text.stopped:
            finished.add(token.sequence)
        if token.sequence == 0:
            yield shown
    timing.prefill_seconds += first_token - started
    timing.decode_seconds += time.perf_counter() - first_token
    for number, (completion, text) in enumerate(zip(completions, texts, strict=True)):
        shown = text.end()
        completion.text += shown
        if number == 0:
            yield shown
        full = len(ids[number]) + completion.tokens == model.config.max_seq_len
        ended = "length" if completion.tokens == max_new_tokens else "context" if full else "eos"
        completion.finish = "stop" if text.stopped else ended


class TextStream:
    """Turns the bytes of tokens into text: whole characters only, up to the first stop text.

    The end of the text is held back as long as it may be the beginning of a stop text.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stop = stop
        # The bytes of a character may come in several tokens.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add(self, data: bytes) -> str:
        """Returns the text that is now certain."""
        return self._certain(self._decoder.decode(data))

    def end(self) -> str:
        """Returns the rest."""
        rest = self._certain(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return rest

    def _certain(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        # A complete stop text would have been found above, so at least its last character is missing.
        longest = min(len(self._held), max(map(len, self._stop), default=1) - 1)
        keep = next((n for n in range(longest, 0, -1) if self._may_stop(self._held[-n:])), 0)
        at = len(self._held) - keep
        certain, self._held = self._held[:at], self._held[at:]
        return certain

    def _may_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)


def _report_full_contexts(completions: Sequence[Completion], model: Transformer, max_new_tokens: int) -> None:
    full = [completion for completion in completions if completion.finish == "context"]
    if full:
        which = "" if len(completions) == 1 else f"{len(full)} of {len(completions)} continuations "
        print(
            f"{which}stopped after {full[0].tokens} of {max_new_tokens} tokens: the model's context of "
            f"{model.config.max_seq_len} tokens (model.max_seq_len) is full",
            file=sys.stderr,
        )


def _write(text: str) -> None:
    if text:
        # In a file or a pipe the text is the result, unchanged. A terminal would obey its control characters.
        sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
        # Without flush a terminal shows a line only when it is complete.
        sys.stdout.flush()
