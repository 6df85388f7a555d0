"""Copying an object as far as it leads to others that something stands for, and no further."""

import copy
import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from varify.network.reachable import attributes, children, contents, in_slot, slots

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def beneath(value: Any) -> Iterator[Any]:
    """`value` and all that it leads to, each once; of modules and tensors themselves alone."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, PLAIN) or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if not isinstance(one, (Tensor, nn.Module)):
            pending.extend(_children(one))


def _children(value: Any) -> list[Any]:
    if isinstance(value, weakref.ReferenceType):
        return [value()]
    return list(children(value))


class Replacing:
    """A function from an object to its like in which others stand for some: `mapping`, by their identity.

    What leads to none of them is returned as it is. What does is copied: containers, helper objects, functions with
    closures, bound methods, partials, weak references. One object has one copy.

    Args:
        mapping: what stands for an object, by the object's identity.
        earlier: one whose copies serve here too.
    """

    def __init__(self, mapping: Mapping[int, Any], earlier: "Replacing | None" = None) -> None:
        self._mapping = mapping
        self._copies: dict[int, tuple[Any, Any]] = dict(earlier._copies) if earlier else {}
        # what can be written to: the original, its copy, and what both had at first
        self._mutable: list[tuple[Any, Any, list[Any], list[Any]]] = []

    def __call__(self, value: Any) -> Any:
        """`value`, or its copy."""
        if isinstance(value, PLAIN):
            return value
        if id(value) in self._mapping:
            return self._mapping[id(value)]
        if isinstance(value, (Tensor, nn.Module)) or not any(id(one) in self._mapping for one in beneath(value)):
            return value
        return self._copied(value)

    def _copied(self, value: Any) -> Any:
        if id(value) not in self._copies:
            self._copy(value)
        return self._copies[id(value)][1]

    def _keep(self, value: Any, new: Any) -> Any:
        self._copies[id(value)] = value, new
        return new

    def _copy(self, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._copy_function(value)
        elif isinstance(value, types.BuiltinMethodType):
            self._keep(value, getattr(self(value.__self__), value.__name__))
        elif isinstance(value, types.MethodType):
            self._keep(value, types.MethodType(self(value.__func__), self(value.__self__)))
        elif isinstance(value, functools.partial):
            named = {key: self(one) for key, one in value.keywords.items()}
            self._keep(value, type(value)(self(value.func), *map(self, value.args), **named))
        elif isinstance(value, weakref.ReferenceType):
            self._keep(value, weakref.ref(self(value())))
        elif isinstance(value, (tuple, frozenset)):
            self._keep(value, _rebuilt(value, [self(one) for one in value]))
        else:
            self._copy_mutable(value)

    def _copy_function(self, value: types.FunctionType) -> None:
        cells = tuple(self._cell(cell) for cell in value.__closure__ or ())
        new = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
        self._keep(value, new)  # before what it leads to, which may be itself
        for cell, old in zip(cells, value.__closure__ or (), strict=True):
            if cell is not old and contents(cell) is None:
                cell.cell_contents = self(old.cell_contents)
        new.__defaults__ = self(value.__defaults__)
        new.__kwdefaults__ = self(value.__kwdefaults__)
        new.__qualname__, new.__doc__, new.__module__ = value.__qualname__, value.__doc__, value.__module__
        new.__annotations__ = value.__annotations__
        vars(new).update({key: self(one) for key, one in vars(value).items()})

    def _cell(self, cell: Any) -> Any:
        """The cell itself where it leads to nothing of ours, so that it is still shared; else an empty one for it."""
        if id(cell) in self._copies:
            return self._copies[id(cell)][1]
        if not self._leads(contents(cell)):
            return cell
        return self._keep(cell, types.CellType())

    def _leads(self, value: Any) -> bool:
        return any(id(one) in self._mapping for one in beneath(value))

    def _copy_mutable(self, value: Any) -> None:
        is_container = isinstance(value, (dict, list, set, deque))
        new = copy.copy(value) if is_container else _empty(type(value))
        self._keep(value, new)
        had = contents_of(value)
        fill(new, value, self)
        self._mutable.append((value, new, had, contents_of(new)))

    def changed(self) -> bool:
        """Whether an original has other contents now than when it was copied."""
        return any(not _same(contents_of(value), had) for value, _, had, _ in self._mutable)

    def written(self) -> bool:
        """Whether a copy has."""
        return any(not _same(contents_of(new), had) for _, new, _, had in self._mutable)

    def give_back(self, back: "Replacing") -> None:
        """Write into the originals what was written into their copies, as `back` has it."""
        for i, (value, new, _, had) in enumerate(self._mutable):
            if not _same(contents_of(new), had):
                fill(value, new, back)
                self._mutable[i] = value, new, contents_of(value), contents_of(new)

    def copies(self) -> list[Any]:
        """All that were made."""
        return [new for _, new in self._copies.values()]

    def reversed(self) -> dict[int, Any]:
        """The originals by the identity of their copies."""
        return {id(new): value for value, new in self._copies.values()}


def _empty(kind: type) -> Any:
    try:
        return object.__new__(kind)
    except TypeError:  # not written in Python
        return kind.__new__(kind)  # type: ignore[call-overload]


def _rebuilt(value: Any, items: list[Any]) -> Any:
    return value._make(items) if hasattr(value, "_make") else type(value)(items)


def contents_of(value: Any) -> list[Any]:
    """All that is in it, keys and values, in order."""
    own: list[Any] = []
    if isinstance(value, dict):
        own += [thing for item in dict.items(value) for thing in item]
    elif isinstance(value, (list, set, deque)):
        own += list(value)
    own += [thing for item in attributes(value).items() for thing in item]
    return own + [in_slot(slot, value) for slot in slots(type(value))]


def _same(now: list[Any], then: list[Any]) -> bool:
    return len(now) == len(then) and all(map(is_, now, then))


def fill(target: Any, source: Any, like: Callable[[Any], Any]) -> None:
    """Give `target` the contents of `source`, each as `like` has it."""
    if isinstance(source, dict):
        items = {like(key): like(one) for key, one in dict.items(source)}
        dict.clear(target)
        dict.update(target, items)
    elif isinstance(source, (list, deque)):
        things = [like(one) for one in source]
        target.clear()
        target.extend(things)
    elif isinstance(source, set):
        members = {like(one) for one in source}
        target.clear()
        target.update(members)
    own = {key: like(one) for key, one in attributes(source).items()}
    attributes(target).clear()
    attributes(target).update(own)
    for slot in slots(type(source)):
        if (part := in_slot(slot, source)) is not None:
            slot.__set__(target, like(part))
