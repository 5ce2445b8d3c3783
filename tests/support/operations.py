"""Observe torch's operations one by one, also on tensors without memory."""

from collections.abc import Sequence

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Called for each operation inside its block; unlike torch's profiler, it leaves no native thread behind."""

    def before(self, operation: OpOverload) -> None:
        """Called before an operation; an error raised here is the operation's."""

    def after(self, operation: OpOverload, inputs: Sequence[object], result: object) -> None:
        """Called after an operation."""

    def __torch_dispatch__(
        self, operation: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.before(operation)
        result = operation(*args, **kwargs or {})
        self.after(operation, args, result)
        return result


class OutOfMemoryAt(Operations):
    """Raises an out-of-memory error at an operation with this number, counted from 0, of all or of one kind."""

    def __init__(self, number: int, kind: OpOverload | None = None) -> None:
        super().__init__()
        self._left, self._kind = number, kind

    def before(self, operation: OpOverload) -> None:
        self._left -= self._kind in (None, operation)
        if self._left < 0:
            raise torch.OutOfMemoryError("out of memory")
