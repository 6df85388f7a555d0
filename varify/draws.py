"""Many draws through one network: one after another, or several at once by vmap, with the same weights either way."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from varify.calls import CONSTANTS

Theta = dict[str, Any]
# Weights of as many draws at once as fit in this much memory; activations come on top.
BYTES_AT_ONCE = 2**28


def many(
    run: Callable[[Theta], Any],
    draw: Callable[[], Theta],
    n_samples: int,
    at_once: bool | None,
    *,
    slow: bool = False,
    alone: Callable[[Theta], Any] | None = None,
) -> tuple[list[Any], bool]:
    """Outputs of `n_samples` draws, in order, and whether they ran at once.

    Args:
        run: the network's output for one draw.
        draw: one draw. Several are drawn before the first runs, so that they are the same either way.
        n_samples: how many.
        at_once: whether to vectorise; None: unless `slow`.
        slow: the network has operations that are slower vectorised.
        alone: in the place of `run` for draws that run one after another.
    """
    alone = alone or run
    at_once = not slow if at_once is None else at_once
    outputs: list[Any] = []
    most = n_samples
    while len(outputs) < n_samples:
        thetas = [draw()]
        chunk = max(1, min(n_samples - len(outputs), BYTES_AT_ONCE // _bytes(thetas[0])))
        thetas += [draw() for _ in range(chunk - 1)]
        while thetas:
            if not at_once:
                outputs += [alone(theta) for theta in thetas]
                break
            try:
                outputs += _all_at_once(run, thetas[:most])
                thetas = thetas[most:]
            except torch.OutOfMemoryError:
                if most == 1:
                    raise
                most = max(1, min(most, len(thetas)) // 2)
            except Exception:  # no batching rule, randomness in forward, an argument's own error: the loop tells which
                at_once = False
    return outputs, at_once


def vectorised(function: Callable[..., Any], in_dims: Any = 0) -> Callable[..., Any]:
    """`torch.func.vmap` that raises where a loop is the better way: an operation is random or has no batching rule."""
    mapped = torch.func.vmap(function, in_dims=in_dims, randomness="error")

    def run(*args: Any) -> Any:
        with _WITHOUT_FALLBACK:
            return mapped(*args)

    return run


class _WithoutFallback:
    """vmap's own loop, with its warning, off; on again when the last thread has left."""

    def __init__(self) -> None:
        self._functorch: Any = torch._C._functorch
        self._lock, self._within, self._before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                self._before = self._functorch._is_vmap_fallback_enabled()
                self._functorch._set_vmap_fallback_enabled(False)
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                self._functorch._set_vmap_fallback_enabled(self._before)


_WITHOUT_FALLBACK = _WithoutFallback()


class _Refusals(TorchFunctionMode):
    """Sees operations that fail, also where the network's own `except` hides that."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            self.seen = True
            raise


class _Place:
    """Where a tensor goes."""


def _all_at_once(run: Callable[[Theta], Any], thetas: list[Theta]) -> list[Any]:
    stacked = {name: torch.stack([theta[name] for theta in thetas]) for name in thetas[0]}
    template: list[Any] = []

    def tensors(theta: Theta) -> list[Tensor]:
        leaves, spec = pytree.tree_flatten(run(theta))
        if not all(isinstance(leaf, (Tensor, *CONSTANTS)) for leaf in leaves):
            raise TypeError("the output holds an object that may hold tensors in turn")
        template[:] = [[_Place if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    with _Refusals() as refusals:
        columns = vectorised(tensors)(stacked)
    if refusals.seen:
        raise RuntimeError("the network caught an error that it has when it is vectorised only")
    leaves, spec = template
    outputs = []
    for row in zip(*columns, strict=True):
        values = iter(row)
        outputs.append(pytree.tree_unflatten([next(values) if leaf is _Place else leaf for leaf in leaves], spec))
    return outputs


def _bytes(theta: Theta) -> int:
    return max(1, sum(int(t.numel() * t.element_size()) for t in theta.values()))
