"""Traversal of the objects that an object refers to, without running user code.

Copies and views of a network use it, since they must handle everything that its modules reach, not only registered
modules, parameters and buffers.
"""

import logging
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch
from torch import Tensor

# Leaf objects, left out of every traversal: they refer to nothing, and most objects are of these types.
_PLAIN = frozenset(
    {type(None), bool, int, float, complex, str, bytes, range, slice, type(...), CodeType}
    | {torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format}
)
# Not entered: they lead to the rest of the process (modules, loggers, threads) or own none of what they refer to.
_CLOSED: tuple[type, ...] = (
    *(type, ModuleType, Tensor, logging.Filterer, threading.Thread, threading.local),
    *(weakref.ReferenceType, weakref.ProxyType, weakref.CallableProxyType),
)
_DICTS = frozenset({dict, OrderedDict})
_CONTAINERS = (list, tuple, set, frozenset, deque)
# Of these exact types there are no instance attributes to look at; subclasses may have some.
_BARE = frozenset({*_DICTS, *_CONTAINERS, MethodType, BuiltinFunctionType})


def children(value: Any) -> Iterable[Any]:
    """The objects that `value` directly refers to, without plain ones (numbers, strings, dtypes, ...).

    These are keys and values of a dict; items of a list, tuple, set or deque; function and arguments of a `partial`;
    function and object of a bound method; cells, defaults and attributes of a function; attributes and slots of any
    other object. Types, Python modules, tensors, loggers, threads and weak references have none.

    Each child stays alive as long as `value` refers to it, so its `id` stays unique. Nothing that a user's class
    defines is called (properties, `__getattr__`, `__iter__`): such code may have side effects or fail.
    """
    kind = type(value)
    if kind in _DICTS:  # a shortcut: most attributes of a module are dicts, and most of these are empty
        return [part for part in (*value, *value.values()) if type(part) not in _PLAIN] if value else ()
    if kind in _PLAIN or issubclass(kind, _CLOSED):
        return ()
    return [part for part in _parts(value, kind) if type(part) not in _PLAIN]


def reachable(
    roots: Iterable[Any], parts: Callable[[Any], Iterable[Any]] = children, seen: set[int] | None = None
) -> Iterator[Any]:
    """All objects reached from `roots`, these included; each once, plain ones never.

    Args:
        roots: where to start.
        parts: from an object to those to visit next.
        seen: ids of objects to skip; the ids of the visited ones are added.
    """
    seen = set() if seen is None else seen
    pending = list(roots)
    while pending:
        value = pending.pop()
        if type(value) not in _PLAIN and id(value) not in seen:
            seen.add(id(value))
            yield value
            pending.extend(parts(value))


def contents(cell: CellType) -> Any:
    """The value of a closure variable, None while it is unset."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def replaced(value: Any, new: Callable[[Any], Any]) -> Any:
    """`value` with each of its `children` replaced by `new(child)`: in place if it is mutable, else as a new object.

    A function is returned unchanged: its cells may be shared with functions that must keep the old values.
    """
    kind = type(value)
    if kind in _PLAIN or issubclass(kind, (*_CLOSED, FunctionType)):
        return value
    if issubclass(kind, MethodType):
        function, bound = new(value.__func__), new(value.__self__)
        return value if function is value.__func__ and bound is value.__self__ else MethodType(function, bound)
    if issubclass(kind, BuiltinFunctionType):
        bound = _new(value.__self__, new)
        return value if bound is value.__self__ else getattr(bound, value.__name__)
    if issubclass(kind, dict):
        _replace_in_dict(value, new)
    elif issubclass(kind, _CONTAINERS):
        value = _replaced_items(value, kind, new)
    elif issubclass(kind, partial):
        bound = (new(value.func), new(value.args), new(value.keywords))
        if bound[0] is not value.func or bound[1] is not value.args:
            partial.__setstate__(value, (*bound, attributes(value)))  # type: ignore[attr-defined]  # not in typeshed
    if kind not in _BARE:
        _replace_in_dict(attributes(value), new)
        for slot in slots(kind):
            part = in_slot(slot, value)
            if (now := _new(part, new)) is not part:
                slot.__set__(value, now)
    return value


def _parts(value: Any, kind: type) -> Iterator[Any]:
    if issubclass(kind, dict):
        yield from list(dict.keys(value))
        yield from list(dict.values(value))
    elif issubclass(kind, _CONTAINERS):
        yield from _items(value, kind)
    elif issubclass(kind, MethodType):
        yield from (value.__func__, value.__self__)
    elif issubclass(kind, BuiltinFunctionType):
        yield value.__self__
    elif issubclass(kind, partial):
        yield from (value.func, value.args, value.keywords)
    elif kind is FunctionType:
        yield from map(contents, value.__closure__ or ())
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
    if kind not in _BARE:
        yield from list(attributes(value).values())
        yield from (in_slot(slot, value) for slot in slots(kind))


def _items(value: Any, kind: type) -> list[Any]:
    base = next(base for base in _CONTAINERS if issubclass(kind, base))
    return list(base.__iter__(value))


def attributes(value: object) -> dict[str, Any]:
    """`vars(value)` without running code of its class; an empty dict if it has no `__dict__`."""
    for base in type(value).__mro__:
        found = base.__dict__.get("__dict__")
        # the real descriptor only: a class may define a property of that name, which would run user code
        if found is not None and type(found) in (GetSetDescriptorType, MemberDescriptorType):
            own = found.__get__(value)
            return {} if own is None else own
    return {}


def slots(kind: type) -> list[MemberDescriptorType]:
    """The `__slots__` descriptors of a class, inherited ones included."""
    bases = [base for base in kind.__mro__ if "__slots__" in base.__dict__]
    return [slot for base in bases for slot in base.__dict__.values() if type(slot) is MemberDescriptorType]


def in_slot(slot: MemberDescriptorType, value: object) -> Any:
    """The value in a slot, None if it is unset."""
    try:
        return slot.__get__(value)
    except AttributeError:  # unset
        return None


def _new(part: object, new: Callable[[Any], Any]) -> Any:
    return part if type(part) in _PLAIN else new(part)


def _replace_in_dict(value: dict[Any, Any], new: Callable[[Any], Any]) -> None:
    before = list(dict.items(value))
    now = [(_new(key, new), _new(part, new)) for key, part in before]
    # A new key means refilling, by methods that a subclass may override; new values alone are set without them.
    if any(key is not old for (key, _), (old, _) in zip(now, before, strict=True)):
        value.clear()
        value.update(now)
        return
    for (key, part), (_, old) in zip(now, before, strict=True):
        if part is not old:
            dict.__setitem__(value, key, part)


def _replaced_items(value: Any, kind: type, new: Callable[[Any], Any]) -> Any:
    before = _items(value, kind)
    now = [_new(part, new) for part in before]
    if all(part is old for part, old in zip(now, before, strict=True)):
        return value
    if issubclass(kind, tuple):
        return tuple.__new__(kind, now)
    if issubclass(kind, frozenset):
        return frozenset.__new__(kind, now)
    value.clear()
    value.update(now) if issubclass(kind, set) else value.extend(now)
    return value
