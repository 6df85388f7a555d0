"""Deep copies of a network: a full one, and one on the meta device to try things on.

`copy.deepcopy` shares functions between copy and original. A function that refers back to its network (`self.act =
lambda x: self.a(x)`, a closure registered as a hook) would then run the original's layers. Such functions are rebuilt
here, so that the copy's refer to the copy.
"""

import copy
import functools
from collections import deque
from collections.abc import Iterable
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from varify.errors import ModelError
from varify.network.reachable import children, contents, reachable, replaced
from varify.network.references import References, globals_of

M = TypeVar("M", bound=nn.Module)

# Marks a deepcopy memo whose outermost `copy_network` call will rebuild all functions at its end, so that a nested call
# (from the `__deepcopy__` of a module within) leaves them alone. An id, since the keys of a memo are ids.
_REBUILT_BY_OUTER_CALL = object()


def copy_network(network: M, memo: dict[int, Any] | None = None) -> M:
    """A deep copy with its own parameters and buffers; classes and ties are those of `network`.

    Unlike `copy.deepcopy` it copies sparse parameters, and networks with a computed (non-leaf) tensor as an attribute,
    such as a cache or the weight of an old-style `weight_norm`: the copy has its value, detached. Functions that refer
    to the network by closures or defaults are rebuilt to refer to the copy.

    Args:
        network: not changed.
        memo: of an enclosing `copy.deepcopy`. With it, a function that cannot be rebuilt is shared, as in torch.

    Raises:
        ModelError: an object in the network cannot be copied, or its copy would run the original.
    """
    references = References(network)
    strict, memo = memo is None, {} if memo is None else memo
    for tensor in references.tensors():
        if id(tensor) not in memo and (not tensor.is_leaf or tensor.layout is not torch.strided):
            clone = tensor.detach().clone()
            memo[id(tensor)] = nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
    try:
        return _copied(network, references, memo, strict)
    except ModelError:
        raise
    except Exception as error:
        why = f"{type(network).__name__} can't be copied ({type(error).__name__}: {error})"
        raise ModelError(f"{why}; remove the attribute in question, or give its class a __deepcopy__") from error


def weightless_copy(network: M) -> M:
    """A deep copy on the meta device: shapes and dtypes without data, so that trying things on it has no effect."""
    references = References(network)
    memo: dict[int, Any] = {}
    for tensor in references.tensors():
        empty = torch.empty_like(tensor.detach(), device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return _copied(network, references, memo, strict=False)


def _copied(network: M, references: References, memo: dict[int, Any], strict: bool) -> M:
    if id(_REBUILT_BY_OUTER_CALL) in memo:
        return copy.deepcopy(network, memo)
    memo[id(_REBUILT_BY_OUTER_CALL)] = True
    try:
        copied = copy.deepcopy(network, memo)
    finally:
        del memo[id(_REBUILT_BY_OUTER_CALL)]
    for module in copied.modules():
        if isinstance(module, torch.jit.ScriptModule):  # its copy has results of a computation for parameters
            for parameter in module.parameters():
                needs_gradient = parameter.requires_grad
                parameter.detach_().requires_grad_(needs_gradient)
    if references.need_rebuilding(strict):
        _FunctionRebuilder(references, memo, strict).rebuild(copied)
    return copied


class _FunctionRebuilder:
    """Rebuilds the functions in a copy that still lead to the original.

    It walks over the finished copy, with deepcopy's memo for the copies by id of the originals. Entering functions into
    the memo beforehand would not do: deepcopy does not look up the function of a bound method there, and from
    Python 3.14 on no function.
    """

    def __init__(self, references: References, memo: dict[int, Any], strict: bool) -> None:
        self._references, self._memo, self._strict = references, memo, strict
        self._rebuilt: dict[int, tuple[Any, Any]] = {}
        self._cells: dict[int, CellType] = {}
        self._pending: list[Any] = []
        self._seen: set[int] = set()
        self._harmless: set[int] = set()

    def rebuild(self, copied: object) -> None:
        """Rebuild all functions that `copied` reaches. Nothing of the original is changed."""
        self._counterpart(copied)
        while self._pending:
            value = self._pending.pop()
            if id(value) not in self._seen:
                self._seen.add(id(value))
                replaced(value, self._counterpart)

    def _counterpart(self, part: Any) -> Any:
        """What the copy refers to where the original refers to `part`."""
        kind = type(part)
        if id(part) in self._rebuilt:
            return self._rebuilt[id(part)][1]
        if kind is FunctionType:
            return self._function(part) if part in self._references else part
        if issubclass(kind, (tuple, frozenset, MethodType, BuiltinFunctionType)):
            new = replaced(part, self._counterpart)
            self._rebuilt[id(part)] = part, new
            return new
        if part in self._references:  # an object of the original, which must not be changed: take its copy
            if not self._references.leads(part):
                return part
            if id(part) not in self._memo:
                if self._strict and self._references.leads_by_function(part):
                    raise ModelError(
                        f"{self._references.attribute_of(part)} holds a function that leads to the network within a "
                        f"{kind.__name__} that can't be copied, so that a copy would run the original; "
                        "store the function itself, or make it a method of the network"
                    )
                return part
            part = self._memo[id(part)]
        self._pending.append(part)
        return part

    def _function(self, function: FunctionType) -> FunctionType:
        if self._strict:
            self._refuse_globals(function)
        if not self._references.leads(function):
            return function
        # New cells, since setting the old ones would redirect the original's functions. They are filled after the new
        # function is known by `_rebuilt`: a recursive function is the content of one of its own cells.
        closure = tuple(self._cell(cell) for cell in function.__closure__ or ())
        new_function = FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
        functools.update_wrapper(new_function, function, updated=())
        self._rebuilt[id(function)] = function, new_function
        for name, old, new in zip(function.__code__.co_freevars, function.__closure__ or (), closure, strict=True):
            if new is not old and contents(new) is None:
                new.cell_contents = self._part(function, name, old.cell_contents)
        if function.__defaults__ is not None:
            defaults = function.__defaults__
            new_function.__defaults__ = tuple(self._part(function, "its defaults", part) for part in defaults)
        if function.__kwdefaults__ is not None:
            named = function.__kwdefaults__.items()
            new_function.__kwdefaults__ = {name: self._part(function, name, part) for name, part in named}
        new_function.__dict__ = {name: self._part(function, name, part) for name, part in vars(function).items()}
        return new_function

    def _cell(self, cell: CellType) -> CellType:
        """A new cell for one that leads to the network; any other stays shared between copy and original.

        Functions that share a variable must share the new cell, or `nonlocal` in one would not reach the others.
        """
        if not self._references.leads(contents(cell)):
            return cell
        return self._cells.setdefault(id(cell), CellType())

    def _part(self, function: FunctionType, name: str, part: object) -> Any:
        if not self._references.leads(part):
            return part
        try:
            return self._counterpart(copy.deepcopy(part, self._memo))
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{self._references.attribute_of(function)} holds the function {_described(function)}, which leads to "
                f"the network by {name}, a {type(part).__name__} that can't be copied "
                f"({type(error).__name__}: {error}); "
                "let it close over the module itself, or register it after the conversion"
            ) from error

    def _refuse_globals(self, function: FunctionType) -> None:
        for name in globals_of(function):
            found = reachable([function.__globals__.get(name)], self._global_parts, self._harmless)
            if any(self._references.is_own(part) for part in found):
                raise ModelError(
                    f"{self._references.attribute_of(function)} holds the function {_described(function)}, which leads "
                    f"to the network by the global variable {name}, so that a copy would run the original; bind it "
                    f"instead, as in `lambda x, {name}={name}: ...`, or make the function a method of the network"
                )

    def _global_parts(self, value: Any) -> Iterable[Any]:
        """What a function may run by a global variable: callables and containers of them.

        Other objects, such as a trainer, may refer to the network for reasons of their own, so they are not entered.
        """
        kind = type(value)
        if self._references.is_own(value) or not (
            callable(value) or issubclass(kind, (dict, list, tuple, set, frozenset, deque))
        ):
            return ()
        if kind is not FunctionType:
            return children(value)
        return [*children(value), *map(value.__globals__.get, globals_of(value))]


def _described(function: FunctionType) -> str:
    code = function.__code__
    return f"{function.__qualname__} ({code.co_filename}, line {code.co_firstlineno})"
