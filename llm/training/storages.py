"""Counts the memory of tensors while torch runs, on any device, also with meta and fake tensors."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveStorages(TorchDispatchMode):
    """While it is active, every storage that an op makes counts as long as it exists.

    This includes storages that backward still needs and that checkpointing keeps. `bytes` is the current size, `peak`
    the largest size after any op. Temporary memory inside an op is not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """known: tensors whose storages are not counted, such as the parameters."""
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
        # The mode is off here, so this call runs the op itself.
        out = func(*args, **(kwargs or {}))
        seen = self._live
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                # Counted per storage, because a view shares the storage of its base.
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known and (key not in seen or seen[key][0].expired()):
                    # Weak, so that the count does not keep the storage alive.
                    seen[key] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out
