"""What the tests of both forms of cross-entropy vary: options, targets, and how tensors lie in memory."""

import itertools

import pytest
import torch
from torch import Tensor

SETTINGS = [("vocab_size", 31), ("z_loss", 0.01), ("reduction", "none"), ("reduction", "sum")]
ALONE_AND_IN_PAIRS = [
    dict(chosen)
    for n in range(3)
    for chosen in itertools.combinations(SETTINGS, n)
    if len(dict(chosen)) == n  # one reduction at a time
]

any_strides = pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
        lambda x: torch.cat((x, x), -1)[..., ::2],
        lambda x: torch.cat((x.flatten(), x.flatten()))[3 : 3 + x.numel()].view(x.shape),
        lambda x: x[:1].expand(x.shape),
    ],
    ids=["transposed", "slice of each row", "every other column", "offset", "expanded"],
)


def targets(n_rows: int, vocab_size: int, ignored: str = "some", ignore_index: int = -100) -> Tensor:
    """int64 [n_rows]; `ignored`: "all", "some" (every third) or "none" of them."""
    target = torch.randint(vocab_size, (n_rows,))
    if ignored == "all":
        target[:] = ignore_index
    elif ignored == "some":
        target[1::3] = ignore_index
    return target
