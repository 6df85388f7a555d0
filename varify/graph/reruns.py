"""Activation checkpoints run parts of a call again in backward: the noise is to be the same then."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from varify.graph.tensor_views import Path


def random_state(device: torch.device) -> Tensor:
    """Of the default generator of a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Put the default generator of a device into a state."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@contextmanager
def noise_of_use(
    states: dict[Path, tuple[Tensor, Tensor]], path: Path, again: bool, device: torch.device
) -> Iterator[None]:
    """Within, the random numbers of a use; `again`: those of its first time, whatever the generator's state is.

    A checkpoint that restored the generator goes on with the numbers that followed then, also where the use itself has
    kept its noise and draws none.
    """
    if not again and not in_checkpoint():  # it will not run again
        yield
        return
    now = random_state(device)
    if not again:
        yield
        states.setdefault(path, (now, random_state(device)))
    elif path not in states:
        yield
    else:
        before, after = states[path]
        set_random_state(device, before)
        try:
            yield
        finally:
            set_random_state(device, after if torch.equal(now, before) else now)


def in_checkpoint() -> bool:
    """Whether a checkpoint that saves no tensors is around: backward runs what is within again."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]  # within transforms
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def kept_by_no_checkpoint() -> Any:
    """Within, tensors are saved for backward as ever: a checkpoint would not find them when it runs again."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]  # within transforms
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_itself, _itself)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def may_run_again() -> bool:
    """Whether a checkpoint may be around a call: backward runs it again then, and must find what forward did.

    Of a reentrant one nothing is seen but that gradients are off.
    """
    return not torch.is_grad_enabled() or in_checkpoint()
