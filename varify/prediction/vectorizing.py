"""Run a network with several draws at once by vmap, and find out what that costs."""

import threading
import weakref
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Theta = dict[str, Any]
# Leaves of an output other than tensors; an object of any other type may contain tensors.
CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, Enum)


def autocast_acts() -> bool:
    """Whether autocast is on. vmap does not follow it: some operations return another dtype there."""
    return any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


class Switch:
    """A setting of torch's that can be off for a while.

    It is of the process, so it is set back when the last thread leaves.

    Args:
        is_on: tells whether it is on.
        put: sets it.
    """

    def __init__(self, is_on: Callable[[], bool], put: Callable[[bool], Any]) -> None:
        self.is_on, self._put = is_on, put
        self._lock, self._within, self._before = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                self._before = self.is_on()
                self._put(False)
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                self._put(self._before)


class Off:
    """Context in which several settings are off."""

    def __init__(self, *switches: Switch) -> None:
        self.switches = switches

    def __enter__(self) -> None:
        for switch in self.switches:
            switch.__enter__()

    def __exit__(self, *_: object) -> None:
        for switch in self.switches:
            switch.__exit__()


_FUNCTORCH: Any = torch._C._functorch
# vmap's own loop, with its warning
_FALLBACK = Switch(_FUNCTORCH._is_vmap_fallback_enabled, _FUNCTORCH._set_vmap_fallback_enabled)
FUSED_LAYERS = Switch(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled)
FUSED_ATTENTION = (
    Switch(torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    Switch(torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    Switch(torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)
_WITHOUT_RULE = Off(_FALLBACK, FUSED_LAYERS)
_WITHOUT_RULE_ON_CPU = Off(_FALLBACK, FUSED_LAYERS, *FUSED_ATTENTION)


def vectorized(function: Callable[..., Any], in_dims: Any = 0, randomness: str = "error") -> Callable[..., Any]:
    """`torch.func.vmap` that raises where a loop is better: operations without a batching rule, and any in autocast.

    Attention goes by its plain mathematics where torch's kernel for it has no such rule, which is on a CPU.

    Args:
        function: to map.
        in_dims: as for vmap.
        randomness: as for vmap: "error" or "different".
    """
    mapped = torch.func.vmap(function, in_dims=in_dims, randomness=randomness)

    def run(*args: object) -> Any:
        if autocast_acts():
            raise RuntimeError("autocast is on")
        on_cpu = any(isinstance(leaf, Tensor) and leaf.device.type == "cpu" for leaf in pytree.tree_leaves(args))
        with _WITHOUT_RULE_ON_CPU if on_cpu else _WITHOUT_RULE:
            return mapped(*args)

    return run


class Cost(NamedTuple):
    """What one draw costs in a vectorized run.

    Attributes:
        operations: number of results, those that don't depend on the draw included.
        all: bytes of these results.
        drawn: bytes of those that depend on the draw.
        peak: most bytes of operands and result of one operation that depends on the draw.
    """

    operations: int = 0
    all: int = 0
    drawn: int = 0
    peak: int = 0


class _Watching(TorchFunctionMode):
    """Watches operations: which fail, also if the network catches the error, whose results stay alive, what they cost.

    Attributes:
        refused: whether one failed.
        cost: see `Cost`, if it counts; a result depends on the draw if it is batched.
    """

    def __init__(self, counts: bool = False) -> None:
        super().__init__()
        self.refused, self._counts = False, counts
        self.cost = Cost()
        self._results: list[weakref.ref[Tensor]] = []

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            result = func(*args, **(kwargs or {}))
        except Exception:
            self.refused = True
            raise
        operands = {id(arg): arg for arg in (*args, *(kwargs or {}).values())}
        new = [tensor for tensor in _tensors_in(result) if id(tensor) not in operands]
        if new:
            self._results += [weakref.ref(tensor) for tensor in new]
            if self._counts:
                self._count(new, [x for x in operands.values() if isinstance(x, Tensor)])
        return result

    def _count(self, results: list[Tensor], operands: list[Tensor]) -> None:
        operations, everything, drawn, peak = self.cost
        size, batched = _bytes(results), [x for x in results if _FUNCTORCH.is_batchedtensor(x)]
        if batched:
            drawn += _bytes(batched)
            peak = max(peak, _bytes([*batched, *(x for x in operands if _FUNCTORCH.is_batchedtensor(x))]))
        self.cost = Cost(operations + 1, everything + size, drawn, peak)

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


class Stack(NamedTuple):
    """Several draws.

    Attributes:
        tensors: by name, `(number, *shape)`.
        number: of draws.
    """

    tensors: Theta
    number: int

    @classmethod
    def of(cls, thetas: Sequence[Theta]) -> "Stack":
        """A copy of them."""
        return cls({name: torch.stack([theta[name] for theta in thetas]) for name in thetas[0]}, len(thetas))

    def draw(self, i: int) -> Theta:
        """One of them."""
        return {name: tensor[i] for name, tensor in self.tensors.items()}

    def part(self, begin: int, end: int) -> "Stack":
        """Some of them."""
        return Stack({name: tensor[begin:end] for name, tensor in self.tensors.items()}, end - begin)


def run_vectorized(
    run: Callable[[Theta], Any], draws: Stack, randomness: str = "error", *, counts: bool = False
) -> tuple[list[Any] | Tensor, Cost]:
    """The output for each draw, stacked if it is one tensor, and what one costs.

    Args:
        run: from one draw to the network's output.
        draws: to run at once.
        randomness: of the network, as for vmap.
        counts: whether to find out the cost, which takes time at each operation.
    """
    template: list[Any] = []

    def tensors(theta: Theta, _: Tensor) -> list[Tensor]:
        leaves, spec = pytree.tree_flatten(run(theta))
        if not all(isinstance(leaf, (Tensor, *CONSTANTS)) for leaf in leaves):
            raise TypeError("the output has an object that may contain tensors")
        template[:] = [[_TensorLeaf if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    watching = _Watching(counts)
    with watching:
        # the numbers tell how many draws there are where no weight is drawn
        columns = vectorized(tensors, randomness=randomness)(draws.tensors, torch.arange(draws.number))
    if watching.refused:
        raise RuntimeError("the network caught an error that it may have only when it is vectorized")
    if watching.any_alive(columns, _FUNCTORCH.is_functorch_wrapped_tensor):
        raise RuntimeError("the network stores a tensor of the call")
    leaves, spec = template
    if spec.is_leaf() and columns:
        return _of_its_own(columns[0], draws), watching.cost
    outputs = []
    for row in zip(*columns, strict=True):
        values = iter(row)
        outputs.append(pytree.tree_unflatten([next(values) if leaf is _TensorLeaf else leaf for leaf in leaves], spec))
    return outputs, watching.cost


def _of_its_own(column: Tensor, draws: Stack) -> Tensor:
    """What a network returned, but copied if that is a weight: draws may be used again."""
    if _FUNCTORCH.is_functorch_wrapped_tensor(column):
        return column.clone()
    kept = {tensor.untyped_storage().data_ptr() for tensor in draws.tensors.values()}
    return column.clone() if column.untyped_storage().data_ptr() in kept else column.contiguous()


def _bytes(tensors: list[Tensor]) -> int:
    return sum(0 if x.is_nested or x.layout is not torch.strided else x.numel() * x.element_size() for x in tensors)
