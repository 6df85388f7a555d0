"""Many draws through one network: one after another, or several at once by vmap, with the same weights either way."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Theta = dict[str, Any]
# Weights of as many draws at once as fit in this much memory; activations come on top.
BYTES_AT_ONCE = 2**28


def many(
    run: Callable[[Theta], Any], draw: Callable[[], Theta], n_samples: int, at_once: bool | None, *, slow: bool = False
) -> list[Any]:
    """Outputs of `n_samples` draws, in order.

    Args:
        run: the network's output for one draw.
        draw: one draw.
        n_samples: how many.
        at_once: whether to vectorise; None: unless `slow`.
        slow: the network has operations that are slower vectorised.
    """
    if slow if at_once is None else not at_once:
        return [run(draw()) for _ in range(n_samples)]
    outputs: list[Any] = []
    chunk = n_samples
    while len(outputs) < n_samples:
        random = _random_states()
        thetas = [draw()]
        chunk = max(1, min(chunk, BYTES_AT_ONCE // _bytes(thetas[0])))
        thetas += [draw() for _ in range(min(chunk, n_samples - len(outputs)) - 1)]
        try:
            outputs += _vectorised(run, thetas)
        except torch.OutOfMemoryError:
            if chunk == 1:
                raise
            chunk //= 2
            _restore(random)
        except Exception:  # no batching rule, randomness in forward, an argument's own error: the loop tells which
            _restore(random)
            return outputs + [run(draw()) for _ in range(n_samples - len(outputs))]
    return outputs


class _Place:
    """Where a tensor goes."""


def _vectorised(run: Callable[[Theta], Any], thetas: list[Theta]) -> list[Any]:
    stacked = {name: torch.stack([theta[name] for theta in thetas]) for name in thetas[0]}
    template: list[Any] = []

    def tensors(theta: Theta) -> list[Tensor]:
        leaves, spec = pytree.tree_flatten(run(theta))
        template[:] = [[_Place if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    # An operation that is random would draw other numbers than in a loop, so it is an error here, and loops.
    columns = torch.func.vmap(tensors, randomness="error")(stacked)
    leaves, spec = template
    outputs = []
    for row in zip(*columns, strict=True):
        values = iter(row)
        outputs.append(pytree.tree_unflatten([next(values) if leaf is _Place else leaf for leaf in leaves], spec))
    return outputs


def _bytes(theta: Theta) -> int:
    return max(1, sum(int(t.numel() * t.element_size()) for t in theta.values()))


def _random_states() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]


def _restore(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
