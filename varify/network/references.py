"""What the modules of a network refer to, and by which functions they refer back to the network."""

import dis
import sys
from collections.abc import Iterable
from functools import lru_cache
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from varify.network.reachable import children, reachable

# Shared by deepcopy, though they may refer to the network.
_SHARED_BY_DEEPCOPY = (FunctionType, BuiltinFunctionType)
# Functions of these packages refer to no network of the user's by a global variable.
_LIBRARIES = frozenset({"torch", "numpy", *sys.stdlib_module_names} - {"__main__"})


class References:
    """Every object that the modules of a network refer to, and whether it leads back to the network.

    The network's own objects are its modules, parameters and buffers, and an object leads to the network if it reaches
    one of them. The traversal stops there, since each module is a starting point of its own.
    """

    def __init__(self, network: nn.Module) -> None:
        self.kind = type(network).__name__
        self._modules = list(network.modules())
        self._own_tensors = [*network.parameters(), *network.buffers()]
        self._own = {id(part) for part in (*self._modules, *self._own_tensors)}
        self._reached: dict[int, tuple[Any, str, str]] = {}
        holders: dict[int, list[int]] = {}
        for path, module in network.named_modules():
            for attr, root in list(vars(module).items()):
                pending = [root]
                while pending:
                    value = pending.pop()
                    if id(value) in self._reached or id(value) in self._own:
                        continue
                    self._reached[id(value)] = value, path, attr
                    parts = children(value)
                    pending.extend(parts)
                    for part in parts:
                        holders.setdefault(id(part), []).append(id(value))
        # Backwards from the network's own objects, over who refers to whom: one pass, also where references are cyclic.
        self._leading = set(self._own)
        below = list(self._own)
        while below:
            fresh = [holder for holder in holders.get(below.pop(), ()) if holder not in self._leading]
            self._leading.update(fresh)
            below.extend(fresh)
        self._functions = [value for value, *_ in self._reached.values() if type(value) in _SHARED_BY_DEEPCOPY]

    def __contains__(self, value: object) -> bool:
        return id(value) in self._reached or id(value) in self._own

    def attribute_of(self, value: object) -> str:
        """The attribute at which `value` was reached, such as `Net.encoder.act`."""
        _, path, attr = self._reached[id(value)]
        return ".".join(filter(None, (self.kind, path, attr)))

    def is_own(self, value: object) -> bool:
        """Whether `value` is a module, parameter or buffer of the network."""
        return id(value) in self._own

    def leads(self, value: object) -> bool:
        """Whether a module, parameter or buffer of the network is reached from `value` or is `value`."""
        return id(value) in self._leading

    def leads_by_function(self, value: object) -> bool:
        """Whether `value` reaches a function that leads to the network."""
        return any(type(found) is FunctionType and self.leads(found) for found in reachable([value], self._inside))

    def need_rebuilding(self, strict: bool) -> bool:
        """Whether deepcopy shares a function that may lead to the original; `strict`: by its globals, too."""
        return any(
            self.leads(value) or (strict and type(value) is FunctionType and bool(globals_of(value)))
            for value in self._functions
        )

    def tensors(self) -> Iterable[Tensor]:
        """The tensors of which a copy has its own."""
        if not self._functions:
            return [*self._own_tensors, *(value for value, *_ in self._reached.values() if _is_tensor(value))]
        roots = [vars(module) for module in self._modules]
        return (found for found in reachable(roots, self._copied_parts) if _is_tensor(found))

    def _inside(self, value: object) -> Iterable[Any]:
        return () if self.is_own(value) else children(value)

    def _copied_parts(self, value: object) -> Iterable[Any]:
        parts = self._inside(value)
        return [part for part in parts if self.leads(part)] if type(value) is FunctionType else parts


def globals_of(function: FunctionType) -> frozenset[str]:
    """Names of the global variables that a user's function reads; none for a library's."""
    library = str(function.__globals__.get("__name__", "")).partition(".")[0] in _LIBRARIES
    return frozenset() if library else _globals_in(function.__code__)


@lru_cache(maxsize=4096)
def _globals_in(code: CodeType) -> frozenset[str]:
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return frozenset(names).union(*(_globals_in(part) for part in code.co_consts if isinstance(part, CodeType)))


def _is_tensor(value: object) -> bool:
    return issubclass(type(value), Tensor)  # isinstance() reads `__class__`, which a user's proxy may define
