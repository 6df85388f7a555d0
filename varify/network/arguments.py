"""The network's arguments, from what a loader gives for its inputs."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from varify.errors import ArgumentError
from varify.network.parameters import is_variational

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


def unpack(inputs: object, network: nn.Module) -> Arguments:
    """Positional and keyword arguments of `network` from what stands for its inputs.

    A tuple holds positional arguments, a mapping those by keyword. A list holds positional ones, as torch's
    `default_collate` makes them, if `network` needs more than one; if it takes one only, the list is that.

    Raises:
        ArgumentError: a list for a network that needs one argument and takes more: it may be either.
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple) and not hasattr(inputs, "_fields"):
        return inputs, {}
    if isinstance(inputs, list) and _takes_each(network, len(inputs)):
        return tuple(inputs), {}
    return (inputs,), {}


def _takes_each(network: nn.Module, n: int) -> bool:
    """Whether a list of `n` stands for `n` arguments."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while hasattr(network, "_orig_mod") or isinstance(network, wrappers) or is_variational(network):
        network = getattr(network, "_orig_mod", None) or network.module  # type: ignore[assignment]
    try:
        parameters = inspect.signature(network.forward).parameters.values()
    except (TypeError, ValueError):  # no Python function
        return False
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    least = sum(p.default is p.empty for p in named)
    most = math.inf if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(named)
    if least > 1 or most == 1 or n > most:
        return least > 1
    shown = ", ".join(map(str, parameters))
    raise ArgumentError(
        f"the inputs are a list of {n}, which for {type(network).__name__}.forward({shown}) may be its first argument "
        "or all of them: give a tuple, (a, b) for two arguments or ([a, b],) for one"
    )


def fewest(args: Sequence[Any], kwargs: Mapping[str, Any], targets: object) -> int | None:
    """The least number of data that a batch can have; None where no tensor tells.

    It's the least length of its tensors: targets may be flattened to tokens. If the first two dimensions of inputs
    and targets agree, the second may be the data's as well (sequences first).
    """
    given = [x for x in pytree.tree_leaves((list(args), dict(kwargs))) if has_length(x)]
    labels = [y for y in pytree.tree_leaves(targets) if has_length(y)]
    lengths = [len(x) for x in (*given, *labels)]
    for x in given:
        if x.dim() > 1:
            lengths += [x.shape[1] for y in labels if y.shape[:2] == x.shape[:2] or len(y) == x.shape[:2].numel()]
    return min(lengths, default=None)


def has_length(x: object) -> bool:
    """Whether it is a tensor with a first dimension."""
    return isinstance(x, Tensor) and x.dim() > 0
