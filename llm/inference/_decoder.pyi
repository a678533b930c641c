"""Types of the C++ extension that csrc/decoder/bindings.cpp defines."""

import numpy as np
from numpy.typing import NDArray

class Decoder:
    def __init__(
        self,
        *,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        d_model: int,
        d_ff: int,
        vocab_size: int,
        batch: int,
        max_len: int,
        norm_eps: float,
        bf16: bool,  # dtype of the matrices: bf16 or fp32
        steps: list[tuple[str, list[tuple[int, int]]]],  # op, and (address, elements) of each weight; (0, 0): absent
        cache: list[int],  # addresses: k, v, cos, sin, first
        threads: int,
        memory: object,  # kept alive as long as the addresses are read
    ) -> None: ...
    def step(self, tokens: NDArray[np.int64], position: int) -> NDArray[np.float32]: ...  # logits [batch, vocab_size]

class Sampler:
    def __init__(
        self,
        *,
        sequences: list[list[int]],  # the tokens of each so far
        vocab_size: int,
        repetition_penalty: float,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
    ) -> None: ...
    # logits [sequences, vocab_size]. Returns the token and its log-probability for each of the rows.
    def choose(
        self, logits: NDArray[np.float32], rows: list[int], uniforms: list[float]
    ) -> list[tuple[int, float]]: ...
