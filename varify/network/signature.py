"""The signature of a call, which is the key of cached plans; copies of its inputs; and whether a network has hooks."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def call_signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """A hashable key: keyword names, the type of each argument; of tensors dtype, number of dimensions and layout.

    Sizes and values are not part of it, so batches of any size share a plan.
    """
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    return tuple(sorted(kwargs)), tuple(
        (leaf.dtype, leaf.dim(), leaf.layout, leaf.is_nested) if isinstance(leaf, Tensor) else type(leaf)
        for leaf in leaves
    )


def takes(network: nn.Module, name: str) -> bool:
    """Whether forward takes a keyword argument of this name."""
    try:
        parameters = inspect.signature(network.forward).parameters.values()
    except (TypeError, ValueError):  # no Python function
        return True
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


def has_hooks(network: nn.Module) -> bool:
    """Whether a user's hook runs in a call of `network`; torch's own, such as those of `weight_norm`, don't count."""
    return any(
        not _module_of(hook).startswith("torch.")
        for module in network.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )


def _module_of(hook: object) -> str:
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


def copied(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with copies of their tensors, for one of several calls: a forward may write into its inputs."""
    given = tuple(args), dict(kwargs)
    if torch.compiler.is_compiling():  # which makes of a written input a new one, and knows no ids
        return given
    tensors = {id(x): x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)}
    copies = {key: x.clone() for key, x in tensors.items()}  # one that is given twice stays one
    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(lambda x: copies.get(id(x), x), given)
    return found
