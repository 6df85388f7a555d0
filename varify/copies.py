"""Copies of a network: a faithful one, and a weightless one to trace."""

import copy
from collections import deque
from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from varify.errors import ModelError

M = TypeVar("M", bound=nn.Module)


def copy_network(network: M, memo: dict[int, Any] | None = None) -> M:
    """A deep copy with its own parameters and buffers, ties and the class as in `network`.

    Unlike `copy.deepcopy`, takes networks that keep a computed (non-leaf) tensor as an attribute, as a cache or
    the weight of an old-style `weight_norm` is (the copy holds its value, cut from the graph), and sparse parameters.

    Raises:
        ModelError: something else in the network can't be copied.
    """
    memo = {} if memo is None else memo
    for tensor in _tensors(network):
        if id(tensor) not in memo and (not tensor.is_leaf or tensor.layout is not torch.strided):
            clone = tensor.detach().clone()
            memo[id(tensor)] = nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
    try:
        return copy.deepcopy(network, memo)
    except Exception as error:
        why = f"{type(network).__name__} can't be copied ({type(error).__name__}: {error})"
        raise ModelError(f"{why}; remove the attribute that can't be, or give its class a __deepcopy__") from error


def weightless_copy(network: M) -> M:
    """A deep copy on the meta device: shapes and dtypes without numbers, so that running it touches nothing."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(network):
        empty = torch.empty_like(tensor.detach(), device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(network, memo)


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    """Every tensor that `network` holds: parameters, buffers, plain attributes, and those in containers of them."""
    seen: set[int] = set()
    pending: list[Any] = [vars(module) for module in network.modules()]
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            if id(value) not in seen:
                seen.add(id(value))
                yield value
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            pending.extend(value.values() if isinstance(value, dict) else value)


def foreign_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Those that a module holds otherwise than as its own: in containers and helper objects, itself or by a module."""
    own = {id(m) for m in module.modules()} | {id(p) for p in module.parameters()}
    seen = set(own)
    pending: list[Any] = [vars(m) for m in module.modules()]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Parameter):
            yield value
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple, set, deque)):
            pending.extend(value)
        elif isinstance(value, partial):
            pending.extend((value.func, value.args, value.keywords))
        elif isinstance(value, MethodType):
            pending.append(value.__self__)
        elif hasattr(value, "__dict__") and not isinstance(value, (type, FunctionType, ModuleType, Tensor)):
            pending.append(vars(value))
