"""What modules hold, to see whether running them changed it, and to undo that."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn


@dataclass
class Snapshot:
    """What the modules below one hold, to see whether a forward changed it and to undo that."""

    states: list[tuple[dict[str, Any], dict[str, Any], list[tuple[Any, Any]]]] = field(default_factory=list)

    @classmethod
    def of(cls, module: nn.Module) -> "Snapshot":
        """Of `module` and everything below it."""
        states = []
        for part in module.modules():
            own = vars(part)
            inside = [vars(v) if _is_helper(v) else v for v in own.values()]
            containers = [(v, v.copy()) for v in inside if isinstance(v, (dict, list, set, deque))]
            states.append((own, own.copy(), containers))
        return cls(states)

    def changed(self) -> bool:
        """Whether an attribute, or an element of a container or helper object there, is another object now."""
        return any(
            not _same(own, before) or any(not _same(now, then) for now, then in containers)
            for own, before, containers in self.states
        )

    def restore(self) -> None:
        """Put everything back."""
        for own, before, containers in self.states:
            own.clear()
            own.update(before)
            for now, then in containers:
                now.clear()
                now.extend(then) if isinstance(now, (list, deque)) else now.update(then)


@contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    """Within, the network may be run; its attributes and buffers are as before afterwards."""
    snapshot = Snapshot.of(network)
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        snapshot.restore()
        for buffer, value in buffers:
            buffer.data.copy_(value)


def _is_helper(value: Any) -> bool:
    """An object of the user's own, such as a schedule, whose attributes may change."""
    return hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, type, FunctionType, MethodType))


def _same(now: Any, then: Any) -> bool:
    """Element by element the same objects: equality would call user code and compare tensors."""
    if len(now) != len(then):
        return False
    if isinstance(now, dict):
        return all(key in then and then[key] is value for key, value in now.items())
    if isinstance(now, (list, deque)):
        return all(a is b for a, b in zip(now, then, strict=True))
    return bool(now == then)
