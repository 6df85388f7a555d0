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
    """For what torch.utils.checkpoint calls, while any thread is within."""

    def __init__(self) -> None:
        self._lock, self._within = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                setattr(torch_checkpoint, _GENERATOR, _without_reentry)
                torch_checkpoint.CheckpointFunction.apply = staticmethod(_with_reentry)  # type: ignore[method-assign]
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                setattr(torch_checkpoint, _GENERATOR, _PLAIN)
                del torch_checkpoint.CheckpointFunction.apply  # the one that it inherits is there again


_STAND_INS = _StandIns()
_GENERATOR = "_checkpoint_without_reentrant_generator"
_PLAIN = getattr(torch_checkpoint, _GENERATOR)


def _without_reentry(function: Any, *args: Any, **kwargs: Any) -> Any:
    # `checkpoint` itself runs the function the first time; what is handed on here is for later times
    for wrap in reversed(_wraps()):
        function = wrap(function)
    return _PLAIN(function, *args, **kwargs)


def _with_reentry(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
    # The reentrant kind calls backward within backward, which would go twice through the graph of one draw.
    if not _wraps():  # another thread's
        return super(torch_checkpoint.CheckpointFunction, torch_checkpoint.CheckpointFunction).apply(
            function, preserve_rng_state, *args
        )
    return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
