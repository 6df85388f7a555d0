"""Substitution: copy an object as far as it refers to objects that are replaced, and share the rest."""

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


def referenced_by(value: object) -> Iterator[Any]:
    """`value` and all objects that it refers to, each once; modules and tensors are not entered."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, PLAIN) or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        if not isinstance(part, (Tensor, nn.Module)):
            pending.extend(_children(part))


def _children(value: object) -> list[Any]:
    if isinstance(value, weakref.ReferenceType):
        return [value()]
    return list(children(value))


class Substitution:
    """A function from an object to its counterpart, in which some objects are replaced by others.

    An object that refers to none of those is returned as it is. Others are copied: containers, helper objects,
    functions with closures, bound methods, partials, weak references. An object has one copy, so that what
    is shared within the network is shared within the view.

    Args:
        mapping: the replacements, by the id of the object that is replaced.
        earlier: a substitution whose copies are used here, too.
    """

    def __init__(self, mapping: Mapping[int, Any], earlier: "Substitution | None" = None) -> None:
        self._mapping = mapping
        self._copies: dict[int, tuple[Any, Any]] = dict(earlier._copies) if earlier else {}
        # of mutable objects: the original, its copy, and the contents of both when the copy was made
        self._mutable: list[tuple[Any, Any, list[Any], list[Any]]] = []

    def __call__(self, value: object) -> Any:
        """The counterpart of `value`."""
        if isinstance(value, PLAIN):
            return value
        if id(value) in self._mapping:
            return self._mapping[id(value)]
        if isinstance(value, (Tensor, nn.Module)) or not self._leads(value):
            return value
        return self._copied(value)

    def _copied(self, value: object) -> Any:
        if id(value) not in self._copies:
            self._copy(value)
        return self._copies[id(value)][1]

    def _add(self, value: object, new: object) -> Any:
        self._copies[id(value)] = value, new
        return new

    def _copy(self, value: object) -> None:
        if isinstance(value, types.FunctionType):
            self._copy_function(value)
        elif isinstance(value, types.BuiltinMethodType):
            self._add(value, getattr(self(value.__self__), value.__name__))
        elif isinstance(value, types.MethodType):
            self._add(value, types.MethodType(self(value.__func__), self(value.__self__)))
        elif isinstance(value, functools.partial):
            named = {key: self(part) for key, part in value.keywords.items()}
            self._add(value, type(value)(self(value.func), *map(self, value.args), **named))
        elif isinstance(value, weakref.ReferenceType):
            self._add(value, weakref.ref(self(value())))
        elif isinstance(value, (tuple, frozenset)):
            self._add(value, _rebuilt(value, [self(part) for part in value]))
        else:
            self._copy_mutable(value)

    def _copy_function(self, value: types.FunctionType) -> None:
        # New cells: a function's variables live in its cells, and setting those of the live function would give it,
        # and all functions that share them, the weights of this call.
        cells = tuple(self._cell(cell) for cell in value.__closure__ or ())
        new = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
        self._add(value, new)  # before the cells are filled: a recursive function is in one of its own
        for cell, old in zip(cells, value.__closure__ or (), strict=True):
            if cell is not old and contents(cell) is None:
                cell.cell_contents = self(old.cell_contents)
        new.__defaults__ = self(value.__defaults__)
        new.__kwdefaults__ = self(value.__kwdefaults__)
        new.__qualname__, new.__doc__, new.__module__ = value.__qualname__, value.__doc__, value.__module__
        new.__annotations__ = value.__annotations__
        vars(new).update({key: self(part) for key, part in vars(value).items()})

    def _cell(self, cell: Any) -> Any:
        """A new, empty cell for one that leads to a replaced object.

        Any other stays shared: a counter that the function increments by `nonlocal` must count in the live network.
        """
        if id(cell) in self._copies:
            return self._copies[id(cell)][1]
        if not self._leads(contents(cell)):
            return cell
        return self._add(cell, types.CellType())

    def _leads(self, value: object) -> bool:
        """Whether `value` refers to a replaced object or is one."""
        return any(id(part) in self._mapping for part in referenced_by(value))

    def _copy_mutable(self, value: object) -> None:
        # A helper object is made without its `__init__` or `__copy__`: user code that runs here may have side effects.
        is_container = isinstance(value, (dict, list, set, deque))
        new = copy.copy(value) if is_container else _empty(type(value))
        self._add(value, new)
        before = contents_of(value)
        fill(new, value, self)
        self._mutable.append((value, new, before, contents_of(new)))

    def changed(self) -> bool:
        """Whether an original was changed since it was copied, so that its copy is out of date."""
        return any(not _same(contents_of(value), before) for value, _, before, _ in self._mutable)

    def written(self) -> bool:
        """Whether a copy was changed since it was made."""
        return any(not _same(contents_of(new), before) for _, new, _, before in self._mutable)

    def write_back(self, back: "Substitution") -> None:
        """Apply to the originals what was written into their copies; `back` maps objects of the view to live ones."""
        for i, (value, new, _, before) in enumerate(self._mutable):
            if not _same(contents_of(new), before):
                fill(value, new, back)
                self._mutable[i] = value, new, contents_of(value), contents_of(new)

    def copies(self) -> list[Any]:
        """All copies."""
        return [new for _, new in self._copies.values()]

    def reversed(self) -> dict[int, Any]:
        """The originals by the id of their copies."""
        return {id(new): value for value, new in self._copies.values()}


def _empty(kind: type) -> Any:
    try:
        return object.__new__(kind)
    except TypeError:  # a class not written in Python
        return kind.__new__(kind)  # type: ignore[call-overload]


def _rebuilt(value: Any, items: list[Any]) -> Any:
    return value._make(items) if hasattr(value, "_make") else type(value)(items)


def contents_of(value: object) -> list[Any]:
    """Keys, items, attributes and slots of a mutable object, in order: two lists that are `is`-equal mean no change."""
    own: list[Any] = []
    if isinstance(value, dict):
        own += [part for item in dict.items(value) for part in item]
    elif isinstance(value, (list, set, deque)):
        own += list(value)
    own += [part for item in attributes(value).items() for part in item]
    return own + [in_slot(slot, value) for slot in slots(type(value))]


def _same(now: list[Any], then: list[Any]) -> bool:
    return len(now) == len(then) and all(map(is_, now, then))


def fill(target: Any, source: Any, counterpart: Callable[[Any], Any]) -> None:
    """Replace the contents of `target` by those of `source`, each mapped by `counterpart`."""
    if isinstance(source, dict):
        entries = {counterpart(key): counterpart(part) for key, part in dict.items(source)}
        dict.clear(target)
        dict.update(target, entries)
    elif isinstance(source, (list, deque)):
        items = [counterpart(part) for part in source]
        target.clear()
        target.extend(items)
    elif isinstance(source, set):
        members = {counterpart(part) for part in source}
        target.clear()
        target.update(members)
    own = {key: counterpart(part) for key, part in attributes(source).items()}
    attributes(target).clear()
    attributes(target).update(own)
    for slot in slots(type(source)):
        if (part := in_slot(slot, source)) is not None:
            slot.__set__(target, counterpart(part))
