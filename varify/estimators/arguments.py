"""Functions of an operation's arguments for `rule`: how often it uses a weight, and why a rule refuses it."""

import math
from typing import Any

import torch

from varify.weights.moments import Moments


def mean_of(parameter: object) -> Any:
    """The mean of moments; any other argument unchanged."""
    return parameter.mu if isinstance(parameter, Moments) else parameter


def rows(arguments: dict[str, Any]) -> int:
    """Number of input rows of a linear map, each of which uses every element of the weight once."""
    name = next(name for name in ("mat1", "input1", "input") if name in arguments)  # addmm has its bias for `input`
    return math.prod(arguments[name].shape[:-1])


def rows_beside(arguments: dict[str, Any]) -> int | None:
    """Number of rows of x in `x @ w`, or of columns in `w @ x`; None for batched matrices on both sides."""
    left, right = arguments["input"].shape, arguments["other"].shape
    return math.prod(left[:-1]) if len(right) == 2 else math.prod(right) // left[-1] if len(left) == 2 else None


def lookups(arguments: dict[str, Any]) -> int:
    """Number of rows that an embedding looks up."""
    return math.prod(arguments["input"].shape)


def broadcast(arguments: dict[str, Any]) -> int | None:
    """How often broadcasting repeats the smaller argument; None where both are repeated, as in an outer product."""
    shapes: list[tuple[int, ...]] = [tuple(getattr(arguments[name], "shape", ())) for name in ("input", "other")]
    sizes: list[int] = [math.prod(shape) for shape in shapes]
    if math.prod(torch.broadcast_shapes(*shapes)) != max(sizes):
        return None
    return max(sizes) // max(1, min(sizes))


def no_bias(arguments: dict[str, Any]) -> str | None:
    """The reason why the first argument of `addmm` is no bias; None if it is one."""
    if arguments.get("scales"):
        return "it is scaled (alpha, beta)"
    return None if len(arguments["input"].shape) == 1 else "what is added is no bias, a vector"


def renormalized(arguments: dict[str, Any]) -> str | None:
    """The reason why an embedding changes the rows that it looks up; None if it does not."""
    return "max_norm depends on the drawn rows" if arguments.get("settings", {}).get("max_norm") is not None else None


def scaled(arguments: dict[str, Any]) -> str | None:
    """The reason why a sum is not x + w; None if it is."""
    return "it is scaled (alpha)" if arguments.get("scales") else None
