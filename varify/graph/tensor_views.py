"""View operations (transpose, reshape, cast, split, ...) applied to a parameter, or to its moments alike."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from varify.weights.moments import Moments

CASTS = frozenset({"to", "float", "half", "bfloat16", "type_as"})
VIEWS = CASTS | {
    *("t", "T", "mT", "transpose", "permute", "movedim", "view", "reshape", "flatten", "unflatten", "squeeze"),
    *("unsqueeze", "contiguous", "view_as", "reshape_as", "swapaxes"),
}
PARTS = frozenset({"chunk", "split", "unbind", "getitem", "narrow", "select"})
TRANSPOSES = frozenset({"t", "T", "mT"})
PROPERTIES = frozenset({"T", "mT"})

# The operations that led from a parameter to a view of it: each a name and the further arguments as text.
Path = tuple[tuple[str, str], ...]


def step(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, str] | None:
    """The step of a `Path` that an operation is, given its name and further arguments; None if it is no view."""
    name = "getitem" if name == "__getitem__" else name
    if name not in VIEWS and name not in PARTS:
        return None
    further = (*args, *sorted(kwargs.items()))
    if any(isinstance(leaf, (Tensor, fx.Node)) for leaf in pytree.tree_leaves(further)):
        return None
    return name, repr(tuple(tuple(arg) if isinstance(arg, torch.Size) else arg for arg in further))


def view_moments(moments: Moments, name: str, *args: object, **kwargs: object) -> Any:
    """The view of moments; a tuple of moments if the operation returns several parts."""
    if name in CASTS:
        mu = getattr(moments.mu, name)(*args, **kwargs)
        return moments.viewed(lambda t: mu if t is moments.mu else t.to(mu.device))
    if name in ("chunk", "split", "unbind"):
        mus, sigmas = (getattr(t, name)(*args, **kwargs) for t in (moments.mu, moments.sigma))
        return tuple(Moments(mu, sigma, moments.examples) for mu, sigma in zip(mus, sigmas, strict=True))
    return moments.viewed(lambda t: view_tensor(t, name, *args, **kwargs), transposes=name in TRANSPOSES)


def view_tensor(tensor: Tensor, name: str, *args: Any, **kwargs: object) -> Any:
    """The view of a tensor; a tuple if the operation returns several parts."""
    if name == "getitem":
        return tensor[args[0]]
    found = getattr(tensor, name)
    return found if name in PROPERTIES else found(*args, **kwargs)
