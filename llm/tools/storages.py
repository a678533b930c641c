"""Counts the memory that tensors hold while torch runs, on any device, meta and fake ones too."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveStorages(TorchDispatchMode):
    """While it is entered, every storage that an op makes counts for as long as it lives, whoever holds it.

    So what backward still needs is counted, and what checkpointing keeps aside. `bytes` are those alive now, `peak`
    the most there were after any op. Memory that an op takes and returns by itself is not seen.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """known: tensors whose storages do not count, such as the parameters."""
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    @property
    def bytes(self) -> int:
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        return sum(size for _, size in self._live.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # The mode is off in here, so this call reaches the op itself.
        out = func(*args, **(kwargs or {}))
        seen = self._live
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                # By storage: a view shares that of its base and takes no memory of its own.
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known and (key not in seen or seen[key][0].expired()):
                    # Weak, so that counting a storage does not keep it alive.
                    seen[key] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out
