"""Running a module of the user's own with other weights in the place of its parameters."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint as checkpoint_module
from torch import Tensor, nn
from torch.func import functional_call

# While weights are swapped in, another thread would see them: whoever reads a network's parameters takes this.
SWAPPED = threading.RLock()


def run_with(module: nn.Module, weights: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `module` with `weights` (by name within it) in the place of its parameters; as it was afterwards."""
    with SWAPPED, _without_checkpointing():
        try:
            return functional_call(module, weights, args, kwargs)
        finally:
            for part in module.modules():
                if isinstance(part, nn.RNNBase):  # else it keeps the drawn weights in its list of flat ones
                    part._init_flat_weights()


@contextmanager
def _without_checkpointing() -> Iterator[None]:
    # torch.utils.checkpoint runs its function again in backward, when the weights are the module's own again: the
    # gradients would be those of the means. So within, it computes once and keeps its activations.
    names = ("_checkpoint_without_reentrant_generator", "CheckpointFunction")
    originals = {name: getattr(checkpoint_module, name) for name in names if hasattr(checkpoint_module, name)}
    for name, stand_in in zip(names, (_once, _Direct), strict=True):
        if name in originals:
            setattr(checkpoint_module, name, stand_in)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(checkpoint_module, name, original)


def _once(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


class _Direct:
    @staticmethod
    def apply(function: Any, preserve_random_state: bool, *args: Any) -> Any:
        return function(*args)
