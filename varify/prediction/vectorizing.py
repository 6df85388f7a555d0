"""Many draws through one network: one after another, or several at once by vmap, with the same weights either way."""

import threading
import weakref
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Theta = dict[str, Any]
# What an output may hold beside tensors; anything else may hold tensors in turn.
CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, Enum)
# Weights of as many draws at once as fit in this much memory; activations come on top.
BYTES_AT_ONCE = 2**28


class Draws(NamedTuple):
    """What `many` returns.

    Attributes:
        outputs: one a draw, in order.
        vectorized: whether they ran at once.
        keeps: whether the network was seen to keep tensors of a call, in a list or a cache; None: nobody looked.
        agrees: whether a draw was seen to have one output by itself and vectorized; None: nobody looked.
    """

    outputs: list[Any]
    vectorized: bool
    keeps: bool | None
    agrees: bool | None


def many(
    run: Callable[[Theta], Any],
    draw: Callable[[], Theta],
    n_samples: int,
    vectorize: bool | None,
    *,
    slow: bool = False,
    watch: bool = True,
) -> Draws:
    """Outputs of `n_samples` draws.

    Args:
        run: the network's output for one draw.
        draw: one draw. Several are drawn before the first runs, so that they are the same either way.
        n_samples: how many.
        vectorize: whether to run several at once; None: unless `slow`.
        slow: the network has operations that are slower vectorized.
        watch: run the first draw by itself, and all others so too if the network keeps a tensor of it (what it would
            keep of a vectorized run is of no use to anybody), or if the output is another when it is vectorized (as
            with a random generator of the network's own, whose number all draws of a run would share).
    """
    vectorize = (not slow if vectorize is None else vectorize) and n_samples > 1
    keeps: bool | None = None
    agrees: bool | None = None
    outputs: list[Any] = []
    alone: list[Any] = []
    most = n_samples
    while len(outputs) < n_samples:
        thetas = [draw()]
        chunk = max(1, min(n_samples - len(outputs), BYTES_AT_ONCE // _bytes(thetas[0])))
        thetas += [draw() for _ in range(chunk - 1)]
        if vectorize and watch and not outputs:
            first, keeps = watched(run, thetas[0])
            alone.append(first)
            vectorize = not keeps
        while thetas:
            if not vectorize:
                outputs += [alone.pop() if alone else run(theta) for theta in thetas]
                break
            try:
                found = _vectorized(run, thetas[:most])
                if alone:
                    vectorize = agrees = _agree(found[0], alone[0])
                if vectorize:
                    alone.clear()
                    outputs += found
                    thetas = thetas[most:]
            except torch.OutOfMemoryError:
                if most == 1:
                    raise
                most = max(1, min(most, len(thetas)) // 2)
            except Exception:  # no batching rule, randomness in forward, an argument's own error: the loop tells which
                vectorize = False
    return Draws(outputs, vectorize, keeps, agrees)


def _agree(one: Any, other: Any) -> bool:
    """Whether two outputs are the same but for rounding."""
    (leaves, spec), (others, other_spec) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return spec == other_spec and all(map(_alike, leaves, others))


def _alike(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not (one.is_floating_point() or one.is_complex()) or not one.numel():
        return torch.equal(one, other)
    rounding = torch.finfo(one.dtype).eps ** 0.5
    scale = float(other.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return torch.allclose(one, other, rounding, rounding * scale, equal_nan=True)


def autocast_acts() -> bool:
    """Whether autocast is on, which vmap does not follow: the outputs of some operations have another type in it."""
    return any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


def vectorized(function: Callable[..., Any], in_dims: Any = 0) -> Callable[..., Any]:
    """`torch.func.vmap` that raises where a loop is the better way.

    That is where an operation is random or has no batching rule, and where autocast is on.
    """
    mapped = torch.func.vmap(function, in_dims=in_dims, randomness="error")

    def run(*args: Any) -> Any:
        if autocast_acts():
            raise RuntimeError("autocast is on")
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


class _Watching(TorchFunctionMode):
    """Sees operations that fail, also where the network's own `except` hides that, and which results stay alive."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = False
        self._results: list[weakref.ref[Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            result = func(*args, **(kwargs or {}))
        except Exception:
            self.refused = True
            raise
        given = {id(one) for one in (*args, *(kwargs or {}).values())}
        self._results += [weakref.ref(one) for one in _tensors_in(result) if id(one) not in given]
        return result

    def kept(self, output: Any, only: Callable[[Tensor], bool] = lambda tensor: True) -> bool:
        """Whether a result is still alive that is not part of the output."""
        returned = _tensors_in(pytree.tree_leaves(output))
        known = {id(one) for tensor in returned for one in (tensor, tensor._base)}
        return any(id(one) not in known and only(one) for ref in self._results if (one := ref()) is not None)


def _tensors_in(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [one for one in result if isinstance(one, Tensor)] if isinstance(result, (tuple, list)) else []


def watched(run: Callable[[Theta], Any], theta: Theta) -> tuple[Any, bool]:
    """The output of one draw, and whether the network keeps a tensor of the call beside it."""
    watching = _Watching()
    with watching:
        output = run(theta)
    output = pytree.tree_map_only(Tensor, Tensor.detach, output)  # others, for the network may keep these as well
    return output, watching.kept((output, list(theta.values())))


class _Place:
    """Where a tensor goes."""


def _vectorized(run: Callable[[Theta], Any], thetas: list[Theta]) -> list[Any]:
    stacked = {name: torch.stack([theta[name] for theta in thetas]) for name in thetas[0]}
    template: list[Any] = []

    def tensors(theta: Theta) -> list[Tensor]:
        leaves, spec = pytree.tree_flatten(run(theta))
        if not all(isinstance(leaf, (Tensor, *CONSTANTS)) for leaf in leaves):
            raise TypeError("the output holds an object that may hold tensors in turn")
        template[:] = [[_Place if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    watching = _Watching()
    with watching:
        columns = vectorized(tensors)(stacked)
    if watching.refused:
        raise RuntimeError("the network caught an error that it has when it is vectorized only")
    if watching.kept(columns, torch._C._functorch.is_functorch_wrapped_tensor):
        raise RuntimeError("the network keeps a tensor of the call")
    leaves, spec = template
    outputs = []
    for row in zip(*columns, strict=True):
        values = iter(row)
        outputs.append(pytree.tree_unflatten([next(values) if leaf is _Place else leaf for leaf in leaves], spec))
    return outputs


def _bytes(theta: Theta) -> int:
    return max(1, sum(int(t.numel() * t.element_size()) for t in theta.values()))
