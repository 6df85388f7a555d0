"""What an object holds, found and replaced without running anybody's code.

The one walk over networks: copies and views of one need to know everything that its modules reach, not only what they
have registered.
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

# They hold nothing, and there are many of them.
_PLAIN = frozenset(
    {type(None), bool, int, float, complex, str, bytes, range, slice, type(...), CodeType}
    | {torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format}
)
# They hold the rest of the process, or nothing that is a part of them.
_CLOSED: tuple[type, ...] = (
    *(type, ModuleType, Tensor, logging.Filterer, threading.Thread, threading.local),
    *(weakref.ReferenceType, weakref.ProxyType, weakref.CallableProxyType),
)
_DICTS = frozenset({dict, OrderedDict})
_CONTAINERS = (list, tuple, set, frozenset, deque)
# A subclass of these may have attributes of its own.
_BARE = frozenset({*_DICTS, *_CONTAINERS, MethodType, BuiltinFunctionType})


def children(value: Any) -> Iterable[Any]:
    """The objects that `value` holds, but for plain ones (numbers, strings, dtypes, ...).

    These are keys and values of a dict, items of a list, tuple, set or deque, what a `partial` or a method is bound to
    and calls, cells, defaults and attributes of a function, and attributes of any other object, in slots as well.
    Nothing of types, Python modules, tensors, loggers and threads, and what a weak reference points to is not held.

    Each stays alive as long as `value` holds it, so that its id is its own. Only `value` itself is looked at: no
    property, `__getattr__` or `__iter__` of a class of the user's own is called.
    """
    kind = type(value)
    if kind in _DICTS:  # the most of a module's attributes, and most of them empty
        return [part for part in (*value, *value.values()) if type(part) not in _PLAIN] if value else ()
    if kind in _PLAIN or issubclass(kind, _CLOSED):
        return ()
    return [part for part in _parts(value, kind) if type(part) not in _PLAIN]


def reachable(
    roots: Iterable[Any], parts: Callable[[Any], Iterable[Any]] = children, seen: set[int] | None = None
) -> Iterator[Any]:
    """Everything reached from `roots`, themselves included, each object once and plain ones never.

    Args:
        roots: where to start.
        parts: of an object, those to go on to.
        seen: ids of objects to leave out, to which those found are added.
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
    """What a closure's variable is, None while it has no value."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def replaced(value: Any, new: Callable[[Any], Any]) -> Any:
    """`value` with `new(part)` for each of its `children`: itself where it can be changed, else another with those.

    A function, which may share its cells with others, is left as it is.
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


def attributes(value: Any) -> dict[str, Any]:
    """What `vars(value)` is, without running code of its class; an empty dict where there is none."""
    for base in type(value).__mro__:
        found = base.__dict__.get("__dict__")
        if found is not None and type(found) in (
            GetSetDescriptorType,
            MemberDescriptorType,
        ):  # not a property of the user's own
            own = found.__get__(value)
            return {} if own is None else own
    return {}


def slots(kind: type) -> list[MemberDescriptorType]:
    """The slots of objects of this class."""
    made = [base for base in kind.__mro__ if "__slots__" in base.__dict__]
    return [slot for base in made for slot in base.__dict__.values() if type(slot) is MemberDescriptorType]


def in_slot(slot: MemberDescriptorType, value: Any) -> Any:
    """What is in it, None if nothing is."""
    try:
        return slot.__get__(value)
    except AttributeError:  # nothing was set
        return None


def _new(part: Any, new: Callable[[Any], Any]) -> Any:
    return part if type(part) in _PLAIN else new(part)


def _replace_in_dict(value: dict[Any, Any], new: Callable[[Any], Any]) -> None:
    before = list(dict.items(value))
    now = [(_new(key, new), _new(part, new)) for key, part in before]
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
