"""One call of a network taken apart: its tensors, and everything else about it as a key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

# Values that a program may hold as constants: immutable, and equal only if they act alike (the type is in the key,
# since 1 == True == 1.0).
CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, Enum)


@dataclass(frozen=True)
class Slot:
    """Where a tensor of a call stands in its list of distinct tensors."""

    index: int


class Layout(NamedTuple):
    """What two calls must share to be served by the same program.

    `slots` has one entry a leaf of `(args, kwargs)`: a `Slot`, or the type and value of a constant. One tensor given
    twice takes the same slot, because code may ask `query is key`.
    """

    spec: Any
    slots: tuple[Slot | tuple[type, Any], ...]
    kinds: tuple[tuple[torch.dtype, int], ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """Hashable; equal for two calls of one layout."""
        try:
            hash(self.spec)
        except TypeError:  # before torch 2.7 a spec with a dict in it has no hash; its text says the same
            return repr(self.spec), self.slots, self.kinds
        return self.spec, self.slots, self.kinds

    def tensors_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The tensors of a call of this layout, in the slots' order.

        Raises:
            ValueError: the call has another structure.
        """
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        if spec != self.spec:
            raise ValueError(
                "the arguments have another structure than those of the example: functional(...) serves calls with the "
                "same number of positional arguments and the same keywords"
            )
        found = {slot.index: leaf for slot, leaf in zip(self.slots, leaves, strict=True) if isinstance(slot, Slot)}
        return [found[i] for i in range(len(found))]

    def rebuild(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` of a call with `tensors`, or whatever stands for them, in the slots."""
        leaves = [tensors[slot.index] if isinstance(slot, Slot) else slot[1] for slot in self.slots]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


class Unkeyable(Exception):
    """An argument is of a type that can't be part of a key; the message names it."""


def take_apart(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Layout, list[Tensor]]:
    """The layout of a call and its distinct tensors.

    Raises:
        Unkeyable: an argument is neither a tensor, a plain constant, nor a container of those.
    """
    # a packed sequence asks its tensors for their device when it is made, which what stands for them doesn't tell
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)), is_leaf=lambda v: isinstance(v, PackedSequence))
    tensors: list[Tensor] = []
    places: dict[int, Slot] = {}
    slots: list[Slot | tuple[type, Any]] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if id(leaf) not in places:
                places[id(leaf)] = Slot(len(tensors))
                tensors.append(leaf)
            slots.append(places[id(leaf)])
        elif isinstance(leaf, CONSTANTS):
            slots.append((type(leaf), leaf))
        else:
            raise Unkeyable(f"an argument of type {type(leaf).__name__}")
    return Layout(spec, tuple(slots), tuple((t.dtype, t.dim()) for t in tensors)), tensors


def mode_of(modules: Sequence[nn.Module]) -> tuple[Any, ...]:
    """Training flags, presence of hooks, a forward of an instance's own: what tracing bakes in is in the key."""
    return tuple([(module.training, has_hooks(module), vars(module).get("forward")) for module in modules])


PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, Enum)


class Attributes:
    """The plain values that modules hold, in attributes and in containers there: tracing bakes them in too."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._owns = [vars(module) for module in modules]
        self._find()

    def _find(self) -> None:
        self._sizes = [len(own) for own in self._owns]
        self._places = [
            (own, name)
            for own in self._owns
            for name, value in own.items()
            if not (name.startswith("_") and name in _OF_MODULE)
            and (value is None or isinstance(value, (*PLAIN, *_CONTAINERS)))
            and name != "training"
        ]

    def key(self) -> tuple[Any, ...]:
        """Hashable: their values now, with their types. Of a container those elements that are plain."""
        if self._sizes != [len(own) for own in self._owns]:  # an attribute is new, and may hide one of its class
            self._find()
        return tuple([_key(own.get(name)) for own, name in self._places])


_CONTAINERS = (list, tuple, dict, set)


def _key(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return value.__class__, value
    return _plain_in(value) if isinstance(value, _CONTAINERS) else id(value)


_OF_MODULE = frozenset(vars(nn.Module()))


def _plain_in(container: Any) -> Any:
    items = container.items() if isinstance(container, dict) else enumerate(container or ())
    return tuple((str(k), type(v), v) for k, v in items if isinstance(v, PLAIN))


def autocast_state() -> tuple[Any, ...]:
    """What autocast does at the moment: the dtypes of intermediate values depend on it."""
    kinds = ("cpu", "cuda")
    return tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs anybody's hook besides its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
