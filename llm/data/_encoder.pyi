"""Types of the C++ extension that csrc/encoder/bindings.cpp defines."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

class Encoder:
    def __init__(self, pieces: list[bytes], scores: list[float], byte_ids: list[int]) -> None: ...
    def encode(
        self, texts: Sequence[bytes], segment_chars: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...  # ids of all texts; where the ids of each text end
