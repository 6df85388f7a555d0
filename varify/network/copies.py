"""Copies of a network: a faithful one, and a weightless one to try things on.

`copy.deepcopy` takes functions as they are. One that leads back to the network it is kept in (`self.act = lambda x:
self.a(x)`, a closure for a hook) would run the original, so the copy gets functions that lead to the copy.
"""

import copy
import dis
import functools
import sys
from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from varify.errors import ModelError
from varify.network.reachable import children, contents, reachable, replaced

M = TypeVar("M", bound=nn.Module)

# In a memo of deepcopy's, which has ids for keys: a copy is being made that will have its functions mended as a whole.
_MENDED_LATER = object()
# What deepcopy doesn't copy, though it may lead to a network.
_TAKEN_AS_THEY_ARE = (FunctionType, BuiltinFunctionType)
# Their globals hold no network of the user's.
_LIBRARIES = frozenset({"torch", "numpy", *sys.stdlib_module_names} - {"__main__"})


def copy_network(network: M, memo: dict[int, Any] | None = None) -> M:
    """A deep copy with its own parameters and buffers, ties and the class as in `network`.

    Unlike `copy.deepcopy`, takes networks that keep a computed (non-leaf) tensor as an attribute, as a cache or
    the weight of an old-style `weight_norm` is (the copy holds its value, cut from the graph), and sparse parameters.
    Functions within that lead to the network, by what they close over or by their defaults, lead to the copy in it.

    Args:
        network: left alone.
        memo: of the `copy.deepcopy` that this is a part of; then what can't be made to lead to the copy is left as it
            is, as in torch.

    Raises:
        ModelError: something else in the network can't be copied, or would run the original.
    """
    holdings = Holdings(network)
    strict, memo = memo is None, {} if memo is None else memo
    for tensor in holdings.tensors():
        if id(tensor) not in memo and (not tensor.is_leaf or tensor.layout is not torch.strided):
            clone = tensor.detach().clone()
            memo[id(tensor)] = nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
    try:
        return _copied(network, holdings, memo, strict)
    except ModelError:
        raise
    except Exception as error:
        why = f"{type(network).__name__} can't be copied ({type(error).__name__}: {error})"
        raise ModelError(f"{why}; remove the attribute that can't be, or give its class a __deepcopy__") from error


def weightless_copy(network: M) -> M:
    """A deep copy on the meta device: shapes and dtypes without numbers, so that running it touches nothing."""
    holdings = Holdings(network)
    memo: dict[int, Any] = {}
    for tensor in holdings.tensors():
        empty = torch.empty_like(tensor.detach(), device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return _copied(network, holdings, memo, strict=False)


class Holdings:
    """What the modules of a network hold, and which of it leads back to them, their parameters or buffers."""

    def __init__(self, network: nn.Module) -> None:
        self.kind = type(network).__name__
        self._modules = list(network.modules())
        self._own_tensors = [*network.parameters(), *network.buffers()]
        self._own = {id(part) for part in (*self._modules, *self._own_tensors)}
        self._found: dict[int, tuple[Any, str, str]] = {}
        holders: dict[int, list[int]] = {}
        for path, module in network.named_modules():
            for attr, root in list(vars(module).items()):
                pending = [root]
                while pending:
                    value = pending.pop()
                    if id(value) in self._found or id(value) in self._own:  # modules have places of their own
                        continue
                    self._found[id(value)] = value, path, attr
                    parts = children(value)
                    pending.extend(parts)
                    for part in parts:
                        holders.setdefault(id(part), []).append(id(value))
        self._leading = set(self._own)
        below = list(self._own)
        while below:
            fresh = [holder for holder in holders.get(below.pop(), ()) if holder not in self._leading]
            self._leading.update(fresh)
            below.extend(fresh)
        self._functions = [value for value, *_ in self._found.values() if type(value) in _TAKEN_AS_THEY_ARE]

    def __contains__(self, value: Any) -> bool:
        return id(value) in self._found or id(value) in self._own

    def place(self, value: Any) -> str:
        """The attribute that `value` was found at."""
        _, path, attr = self._found[id(value)]
        return ".".join(filter(None, (self.kind, path, attr)))

    def is_own(self, value: Any) -> bool:
        """Whether `value` is a module, parameter or buffer of the network."""
        return id(value) in self._own

    def leads(self, value: Any) -> bool:
        """Whether a module, parameter or buffer of the network is reached from `value`, or is it."""
        return id(value) in self._leading

    def leads_by_function(self, value: Any) -> bool:
        """Whether one is reached from `value` by a function on the way."""
        return any(type(found) is FunctionType and self.leads(found) for found in reachable([value], self._inside))

    def need_mending(self, strict: bool) -> bool:
        """Whether deepcopy leaves functions that may lead to the original; `strict`: by globals, too."""
        return any(
            self.leads(value) or (strict and type(value) is FunctionType and bool(_globals_of(value)))
            for value in self._functions
        )

    def tensors(self) -> Iterable[Tensor]:
        """Those that a copy has copies of."""
        if not self._functions:
            return [*self._own_tensors, *(value for value, *_ in self._found.values() if _is_tensor(value))]
        roots = [vars(module) for module in self._modules]
        return (found for found in reachable(roots, self._copied_parts) if _is_tensor(found))

    def _inside(self, value: Any) -> Iterable[Any]:
        return () if self.is_own(value) else children(value)

    def _copied_parts(self, value: Any) -> Iterable[Any]:
        parts = self._inside(value)
        return [part for part in parts if self.leads(part)] if type(value) is FunctionType else parts


def _copied(network: M, holdings: Holdings, memo: dict[int, Any], strict: bool) -> M:
    if id(_MENDED_LATER) in memo:
        return copy.deepcopy(network, memo)
    memo[id(_MENDED_LATER)] = True
    try:
        copied = copy.deepcopy(network, memo)
    finally:
        del memo[id(_MENDED_LATER)]
    for module in copied.modules():
        if isinstance(module, torch.jit.ScriptModule):  # whose copies of parameters are results of a computation
            for parameter in module.parameters():
                needs_gradient = parameter.requires_grad
                parameter.detach_().requires_grad_(needs_gradient)
    if holdings.need_mending(strict):
        _Mending(holdings, memo, strict).mend(copied)
    return copied


class _Mending:
    """Puts functions that lead to a copy in the place of those that lead to the original.

    `memo` has the copies by ids of the originals. It finds them in the copy and not by deepcopy's own search of `memo`,
    for deepcopy leaves out what methods call, and from Python 3.14 on any function.
    """

    def __init__(self, holdings: Holdings, memo: dict[int, Any], strict: bool) -> None:
        self._holdings, self._memo, self._strict = holdings, memo, strict
        self._made: dict[int, tuple[Any, Any]] = {}
        self._cells: dict[int, CellType] = {}
        self._pending: list[Any] = []
        self._seen: set[int] = set()
        self._harmless: set[int] = set()

    def mend(self, copied: Any) -> None:
        """Everything that `copied` reaches; nothing of the original is changed."""
        self._of(copied)
        while self._pending:
            value = self._pending.pop()
            if id(value) not in self._seen:
                self._seen.add(id(value))
                replaced(value, self._of)

    def _of(self, part: Any) -> Any:
        """What the copy is to have in the place of `part`."""
        kind = type(part)
        if id(part) in self._made:
            return self._made[id(part)][1]
        if kind is FunctionType:
            return self._function(part) if part in self._holdings else part
        if issubclass(kind, (tuple, frozenset, MethodType, BuiltinFunctionType)):
            made = replaced(part, self._of)
            self._made[id(part)] = part, made
            return made
        if part in self._holdings:  # the original's own, so not to be changed
            if not self._holdings.leads(part):
                return part
            if id(part) not in self._memo:
                if self._strict and self._holdings.leads_by_function(part):
                    raise ModelError(
                        f"{self._holdings.place(part)} holds a function that leads to the network within a "
                        f"{kind.__name__} that can't be copied, so that a copy would run the original; "
                        "keep the function itself, or make it a method of the network"
                    )
                return part
            part = self._memo[id(part)]
        self._pending.append(part)
        return part

    def _function(self, function: FunctionType) -> FunctionType:
        if self._strict:
            self._refuse_globals(function)
        if not self._holdings.leads(function):
            return function
        closure = tuple(self._cell(cell) for cell in function.__closure__ or ())
        made = FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
        functools.update_wrapper(made, function, updated=())
        self._made[id(function)] = function, made  # before its parts are copied: it may be one of them
        for name, old, new in zip(function.__code__.co_freevars, function.__closure__ or (), closure, strict=True):
            if new is not old and contents(new) is None:
                new.cell_contents = self._part(function, name, old.cell_contents)
        if function.__defaults__ is not None:
            made.__defaults__ = tuple(self._part(function, "its defaults", part) for part in function.__defaults__)
        if function.__kwdefaults__ is not None:
            defaults = function.__kwdefaults__.items()
            made.__kwdefaults__ = {name: self._part(function, name, part) for name, part in defaults}
        made.__dict__ = {name: self._part(function, name, part) for name, part in vars(function).items()}
        return made

    def _cell(self, cell: CellType) -> CellType:
        """Another cell where it leads to the network, the same one for all functions; else itself, to be shared."""
        if not self._holdings.leads(contents(cell)):
            return cell
        return self._cells.setdefault(id(cell), CellType())

    def _part(self, function: FunctionType, name: str, part: Any) -> Any:
        if not self._holdings.leads(part):
            return part
        try:
            return self._of(copy.deepcopy(part, self._memo))
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{self._holdings.place(function)} holds the function {_told(function)}, which leads to the network by "
                f"{name}, a {type(part).__name__} that can't be copied ({type(error).__name__}: {error}); "
                "let it close over the module itself, or register it after the conversion"
            ) from error

    def _refuse_globals(self, function: FunctionType) -> None:
        for name in _globals_of(function):
            found = reachable([function.__globals__.get(name)], self._global_parts, self._harmless)
            if any(self._holdings.is_own(part) for part in found):
                raise ModelError(
                    f"{self._holdings.place(function)} holds the function {_told(function)}, which leads to the "
                    f"network by the global variable {name}, so that a copy would run the original; bind it instead, "
                    f"as in `lambda x, {name}={name}: ...`, or make the function a method of the network"
                )

    def _global_parts(self, value: Any) -> Iterable[Any]:
        """What a function may call in a global: an object in one, such as a trainer, may know the network besides."""
        kind = type(value)
        if self._holdings.is_own(value) or not (
            callable(value) or issubclass(kind, (dict, list, tuple, set, frozenset, deque))
        ):
            return ()
        if kind is not FunctionType:
            return children(value)
        return [*children(value), *map(value.__globals__.get, _globals_of(value))]


def _globals_of(function: FunctionType) -> frozenset[str]:
    """The global variables that a function of the user's own reads."""
    library = str(function.__globals__.get("__name__", "")).partition(".")[0] in _LIBRARIES
    return frozenset() if library else _globals_in(function.__code__)


@lru_cache(maxsize=4096)
def _globals_in(code: CodeType) -> frozenset[str]:
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return frozenset(names).union(*(_globals_in(part) for part in code.co_consts if isinstance(part, CodeType)))


def _is_tensor(value: Any) -> bool:
    return issubclass(type(value), Tensor)  # isinstance() may ask the value, which may be a user's proxy


def _told(function: FunctionType) -> str:
    code = function.__code__
    return f"{function.__qualname__} ({code.co_filename}, line {code.co_firstlineno})"
