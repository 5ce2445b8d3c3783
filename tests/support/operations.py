"""What torch runs, operation by operation, also on tensors without memory."""

from collections.abc import Sequence

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Is told of each operation inside its block. Torch's profiler keeps a native thread that may abort the process."""

    def before(self, operation: OpOverload) -> None:
        """It is about to run; what this raises, it raises."""

    def after(self, operation: OpOverload, inputs: Sequence[object], result: object) -> None:
        """It has run."""

    def __torch_dispatch__(
        self, operation: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.before(operation)
        result = operation(*args, **kwargs or {})
        self.after(operation, args, result)
        return result


class OutOfMemoryAt(Operations):
    """The so-manieth operation finds no memory, of all or of one kind; 0 is the first."""

    def __init__(self, number: int, kind: OpOverload | None = None) -> None:
        super().__init__()
        self._left, self._kind = number, kind

    def before(self, operation: OpOverload) -> None:
        self._left -= self._kind in (None, operation)
        if self._left < 0:
            raise torch.OutOfMemoryError("out of memory")
