"""Run a network with many draws, sequentially or vectorized by vmap, with the same weights either way."""

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
# Leaves of an output other than tensors; an object of any other type may contain tensors.
CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, Enum)
# Draws are vectorized in chunks whose weights take at most this many bytes, without activations.
CHUNK_BYTES = 2**28


class Draws(NamedTuple):
    """What `many` returns.

    Attributes:
        outputs: by draw, in order.
        vectorized: whether they ran vectorized.
        keeps: whether the network was seen to store tensors of a call, in a list or a cache; None if not checked.
        agrees: whether a draw was seen to have the same output alone and vectorized; None if not checked.
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
        run: from one draw to the network's output.
        draw: makes one draw. A chunk is drawn before any of it runs, so that the weights are the same either way.
        n_samples: number of draws.
        vectorize: whether to run vectorized; None: unless `slow`.
        slow: whether the network has operations that are slower vectorized.
        watch: whether to run the first draw alone, and then all sequentially if the network stores a tensor of the call
            (those of a vectorized run are of no use outside of it), or if the output differs from the vectorized one
            (a network with its own random generator, for example, uses one number for all draws of a vectorized run).
    """
    vectorize = (not slow if vectorize is None else vectorize) and n_samples > 1
    keeps: bool | None = None
    agrees: bool | None = None
    outputs: list[Any] = []
    alone: list[Any] = []
    most = n_samples
    while len(outputs) < n_samples:
        thetas = [draw()]
        chunk = max(1, min(n_samples - len(outputs), CHUNK_BYTES // _bytes(thetas[0])))
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
                chunk_outputs = _vectorized(run, thetas[:most])
                if alone:
                    vectorize = agrees = _agree(chunk_outputs[0], alone[0])
                if vectorize:
                    alone.clear()
                    outputs += chunk_outputs
                    thetas = thetas[most:]
            except torch.OutOfMemoryError:
                if most == 1:
                    raise
                most = max(1, min(most, len(thetas)) // 2)
            except Exception:  # no batching rule, randomness, or an error of the user's, which the loop raises again
                vectorize = False
    return Draws(outputs, vectorize, keeps, agrees)


def _agree(one: object, other: object) -> bool:
    """Whether two outputs are equal up to rounding."""
    (leaves, spec), (others, other_spec) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return spec == other_spec and all(map(_alike, leaves, others))


def _alike(one: object, other: object) -> bool:
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
    """Whether autocast is on. vmap does not follow it: some operations return another dtype there."""
    return any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


def vectorized(function: Callable[..., Any], in_dims: Any = 0) -> Callable[..., Any]:
    """`torch.func.vmap` that raises where a loop is better.

    These are random operations, operations without a batching rule, and any in autocast.

    Args:
        function: to map.
        in_dims: as for vmap.
    """
    mapped = torch.func.vmap(function, in_dims=in_dims, randomness="error")

    def run(*args: object) -> Any:
        if autocast_acts():
            raise RuntimeError("autocast is on")
        with _WITHOUT_FALLBACK:
            return mapped(*args)

    return run


class Off:
    """Context in which settings of torch's are off.

    They are of the process, so they are set back when the last thread leaves.

    Args:
        switches: of each setting, what tells whether it is on, and what sets it.
    """

    def __init__(self, *switches: tuple[Callable[[], bool], Callable[[bool], Any]]) -> None:
        self._switches = switches
        self._lock, self._within = threading.Lock(), 0
        self._before: list[bool] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                self._before = [is_on() for is_on, _ in self._switches]
                self._set([False] * len(self._switches))
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                self._set(self._before)

    def _set(self, values: list[bool]) -> None:
        for (_, put), value in zip(self._switches, values, strict=True):
            put(value)


_FUNCTORCH: Any = torch._C._functorch
# vmap's own loop, with its warning
_WITHOUT_FALLBACK = Off((_FUNCTORCH._is_vmap_fallback_enabled, _FUNCTORCH._set_vmap_fallback_enabled))


class _Watching(TorchFunctionMode):
    """Watches operations: which fail, also if the network catches the error, and whose results stay alive."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = False
        self._results: list[weakref.ref[Tensor]] = []

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            result = func(*args, **(kwargs or {}))
        except Exception:
            self.refused = True
            raise
        operands = {id(arg) for arg in (*args, *(kwargs or {}).values())}
        self._results += [weakref.ref(tensor) for tensor in _tensors_in(result) if id(tensor) not in operands]
        return result

    def any_alive(self, output: object, only: Callable[[Tensor], bool] = lambda tensor: True) -> bool:
        """Whether a result is still alive that is not part of the output."""
        returned = _tensors_in(pytree.tree_leaves(output))
        known = {id(part) for tensor in returned for part in (tensor, tensor._base)}
        return any(id(t) not in known and only(t) for ref in self._results if (t := ref()) is not None)


def _tensors_in(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [item for item in result if isinstance(item, Tensor)] if isinstance(result, (tuple, list)) else []


def watched(run: Callable[[Theta], Any], theta: Theta) -> tuple[Any, bool]:
    """The output of one draw, and whether the network stores another tensor of the call."""
    watching = _Watching()
    with watching:
        output = run(theta)
    # New tensors, since the network may store those of the output as well.
    output = pytree.tree_map_only(Tensor, Tensor.detach, output)
    return output, watching.any_alive((output, list(theta.values())))


class _TensorLeaf:
    """A placeholder for a tensor in the flattened output."""


def _vectorized(run: Callable[[Theta], Any], thetas: list[Theta]) -> list[Any]:
    stacked = {name: torch.stack([theta[name] for theta in thetas]) for name in thetas[0]}
    template: list[Any] = []

    def tensors(theta: Theta) -> list[Tensor]:
        leaves, spec = pytree.tree_flatten(run(theta))
        if not all(isinstance(leaf, (Tensor, *CONSTANTS)) for leaf in leaves):
            raise TypeError("the output has an object that may contain tensors")
        template[:] = [[_TensorLeaf if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    watching = _Watching()
    with watching:
        columns = vectorized(tensors)(stacked)
    if watching.refused:
        raise RuntimeError("the network caught an error that it may have only when it is vectorized")
    if watching.any_alive(columns, torch._C._functorch.is_functorch_wrapped_tensor):
        raise RuntimeError("the network stores a tensor of the call")
    leaves, spec = template
    outputs = []
    for row in zip(*columns, strict=True):
        values = iter(row)
        outputs.append(pytree.tree_unflatten([next(values) if leaf is _TensorLeaf else leaf for leaf in leaves], spec))
    return outputs


def _bytes(theta: Theta) -> int:
    return max(1, sum(int(t.numel() * t.element_size()) for t in theta.values()))
