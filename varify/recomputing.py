"""torch.utils.checkpoint in a network whose weights are others for the moment.

It runs its function again in backward, when the weights are the module's own again: the gradients would be those of the
means. So what is checkpointed within `recomputing(wrap)` is wrapped before it is run again.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint as torch_checkpoint

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
_within = threading.local()  # .wraps: those that this thread is in, the outermost first


@contextmanager
def recomputing(wrap: Wrap) -> Iterator[None]:
    """Within, on this thread, what a checkpoint runs again is `wrap(function)`."""
    before = _wraps()
    _within.wraps = (*before, wrap)
    try:
        with _STAND_INS:
            yield
    finally:
        _within.wraps = before


def _wraps() -> tuple[Wrap, ...]:
    return getattr(_within, "wraps", ())


class _StandIns:
    """For the two names that torch.utils.checkpoint looks up at a call, while any thread is within."""

    def __init__(self) -> None:
        self._lock, self._within = threading.Lock(), 0
        self.plain: dict[str, Any] = {}

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                for name, stand_in in _BY_NAME.items():
                    self.plain[name] = getattr(torch_checkpoint, name)
                    setattr(torch_checkpoint, name, stand_in)
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                for name, original in self.plain.items():
                    setattr(torch_checkpoint, name, original)


_STAND_INS = _StandIns()


def _without_reentry(function: Any, *args: Any, **kwargs: Any) -> Any:
    # `checkpoint` itself runs the function the first time; what is handed on here is for later times
    for wrap in reversed(_wraps()):
        function = wrap(function)
    return _STAND_INS.plain["_checkpoint_without_reentrant_generator"](function, *args, **kwargs)


class _WithReentry:
    """The reentrant kind calls backward within backward, which would go twice through the graph of one draw."""

    @staticmethod
    def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        if not _wraps():  # another thread's
            return _STAND_INS.plain["CheckpointFunction"].apply(function, preserve_rng_state, *args)
        return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


_BY_NAME = {"_checkpoint_without_reentrant_generator": _without_reentry, "CheckpointFunction": _WithReentry}
