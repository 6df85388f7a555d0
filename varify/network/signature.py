"""The signature of a call, and whether a network has hooks."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


def call_signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Hashable: of each argument whether it is a tensor, of how many dimensions, of what layout; not its values."""
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
    """Whether calling `network` runs anybody's hook; torch's own, such as those of `weight_norm`, don't count."""
    return any(
        not _module_of(hook).startswith("torch.")
        for module in network.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )


def _module_of(hook: Any) -> str:
    return str(getattr(hook, "__module__", None) or type(hook).__module__)
