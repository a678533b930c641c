"""A trained model in memory, for Python: `llm.load`."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llm.config import Config
from llm.data.tokenizer import Tokenizer
from llm.errors import UserError
from llm.inference.evaluate import BATCH_SIZE
from llm.inference.generate import TEMPERATURE, stream
from llm.inference.sampling import Sampling
from llm.inference.scoring import score_texts
from llm.metrics import Score
from llm.model.checkpoint import load_model, read_state
from llm.model.checkpoint_path import locate
from llm.model.transformer import Transformer
from llm.world import DTYPES, pick_device


@dataclass(frozen=True)
class LanguageModel:
    """A checkpoint's model and tokenizer, in the memory of one device."""

    path: Path
    """The checkpoint's folder."""
    config: Config
    """All settings of the run that made it."""
    step: int
    tokens: int
    """Steps and tokens of training until the checkpoint."""
    position: int
    """The run's position in its data: the next sequence that it reads (`ShardDataset`)."""
    tokenizer: Tokenizer
    module: Transformer = field(repr=False)
    """The torch module: module(ids), int64 [B, S], returns logits, [B, S, vocabulary]. A document begins with BOS."""

    def score(self, texts: Sequence[str], *, stride: int | None = None, batch_size: int = BATCH_SIZE) -> list[Score]:
        """Scores each text as a document of its own, as `llm eval` does.

        Args:
            stride: a text longer than the sequences of training is scored in windows of that length, each with this
                many targets; None: as many as fit.
            batch_size: sequences in one forward pass; short texts share a sequence.

        Raises UserError for a text that is not valid Unicode and for losses that are not finite.
        """
        if isinstance(texts, str):
            raise UserError("score takes a list of texts, not one text: score([text])")
        # The config of an imported model has no data.seq_len.
        context = self.config.data.seq_len or self.config.model.max_seq_len
        stride = context if stride is None else stride
        return score_texts(self.module, self.tokenizer, texts, context=context, stride=stride, batch_size=batch_size)

    def generate(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 100,
        stop: Sequence[str] = (),
        temperature: float = TEMPERATURE,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Continues a prompt. Returns an iterator over pieces of text, each computed when it is asked for.

        Args:
            stop: texts before which the continuation ends. It also ends at EOS, after max_new_tokens, and when prompt
                and continuation fill the model's context.
            temperature, top_k, top_p, min_p, repetition_penalty, seed: see `llm.inference.sampling.Sampling`. The same
                seed gives the same text as `llm generate`.

        Raises UserError for options out of range and for a prompt that leaves no room for a token.
        """
        sampling = Sampling(
            repetition_penalty=repetition_penalty,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
        )
        if isinstance(stop, str):
            raise UserError("stop takes a list of texts, not one text: stop=[text]")
        return stream(self.module, self.tokenizer, prompt, max_new_tokens=max_new_tokens, stop=stop, sampling=sampling)


def load(
    path: str | os.PathLike[str],
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> LanguageModel:
    """Loads a model for scoring and generation.

    Args:
        path: a checkpoint, or a run's folder: its newest checkpoint.
        device: "auto" is a GPU if there is one, else the CPU.
        precision: of the weights.

    Raises UserError if there is no checkpoint, or a damaged one, and if the device cannot be used.
    """
    for name, value, known in (("device", device, ("auto", "cpu", "cuda")), ("precision", precision, ("fp32", "bf16"))):
        if value not in known:
            raise UserError(f"{name} {value!r}: is none of {', '.join(known)}")
    # A running training may change the link `latest`.
    folder = locate(path)
    module, tokenizer = load_model(folder, pick_device(device, way_out="device='cpu'"), DTYPES[precision])
    state, config = read_state(folder)
    return LanguageModel(folder, config, state.step, state.tokens, state.data.position, tokenizer, module)
