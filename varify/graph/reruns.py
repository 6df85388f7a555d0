"""Activation checkpoints: detect them, and give a use that is recomputed in backward the noise of its first run."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from varify.graph.tensor_views import Path


def random_state(device: torch.device) -> Tensor:
    """The state of the default generator of a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Set the state of the default generator of a device."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@contextmanager
def noise_of_use(
    states: dict[Path, tuple[Tensor, Tensor]], path: Path, again: bool, device: torch.device
) -> Iterator[None]:
    """Context in which a use draws its noise; when it is recomputed, the noise of its first run.

    A checkpoint restores the generator only with `preserve_rng_state=True`, so the noise must not depend on that. Where
    it did, the numbers that follow must be those that followed in forward (of dropout, for example), also if the use
    draws none this time since its noise was saved.

    Args:
        states: random states before and after each use, by path from the parameter; those of a first run are added.
        path: of this use.
        again: whether it is recomputed.
        device: of the parameter.
    """
    if not again and not in_checkpoint():  # it will not be recomputed
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
    """Whether this runs within a non-reentrant checkpoint, which saves no tensors and recomputes them in backward."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]  # within transforms
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def hidden_from_checkpoints() -> Any:
    """Context in which tensors are saved for backward as usual, also within a checkpoint.

    A checkpoint counts the tensors that forward saves and expects to meet as many when it recomputes. What is computed
    once a call, such as a draw, is not computed again then, so the checkpoint must not count it.
    """
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]  # within transforms
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_itself, _itself)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def may_run_again() -> bool:
    """Whether a call may be within a checkpoint, so that backward recomputes it.

    Of a reentrant checkpoint nothing can be seen but that gradients are off.
    """
    return not torch.is_grad_enabled() or in_checkpoint()
