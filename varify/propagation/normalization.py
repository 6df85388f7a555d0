"""Normalization. That of a batch is affine in eval mode; that of a layer or group is taken to first order."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varify.propagation.arithmetic import add, mul
from varify.propagation.rules import Op, Uncertain, mean_of, refuse_unless, rule

Parameter = Any  # a tensor, `Uncertain`, or None


@rule(F.batch_norm)
def batch_norm(
    op: Op,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Parameter = None,
    bias: Parameter = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Uncertain:
    """Exactly, by the running statistics."""
    refuse_unless(
        not training and running_mean is not None, "it normalizes by the statistics of the batch, in eval mode as well"
    )
    x = mean_of(input)
    normalized: Any = op(x, running_mean, running_var, eps=eps)
    if isinstance(input, Uncertain):
        normalized = Uncertain(normalized, input.var / _by_channel(running_var + eps, x.dim()))
    return _transformed(normalized, weight, bias, lambda p: _by_channel(p, x.dim()))


def _by_channel(parameter: Tensor, dims: int) -> Tensor:
    return parameter.view(-1, *(1,) * (dims - 2))


@rule(torch.layer_norm)
def layer_norm(
    op: Op, input: Any, normalized_shape: Any, weight: Parameter = None, bias: Parameter = None, eps: float = 1e-5, *_: Any
) -> Uncertain:
    """To first order in the input's deviation from its mean."""
    return _transformed(_standardized(input, len(normalized_shape), eps), weight, bias, lambda p: p)


@rule(torch.rms_norm)
def rms_norm(
    op: Op, input: Any, normalized_shape: Any, weight: Parameter = None, eps: float | None = None
) -> Uncertain:
    """To first order in the input's deviation from its mean."""
    least = torch.finfo(mean_of(input).dtype).eps if eps is None else eps
    return _transformed(_standardized(input, len(normalized_shape), least, centered=False), weight, None, lambda p: p)


@rule(torch.group_norm)
def group_norm(
    op: Op, input: Any, num_groups: int, weight: Parameter = None, bias: Parameter = None, eps: float = 1e-5, *_: Any
) -> Uncertain:
    """To first order in the input's deviation from its mean."""
    shape = mean_of(input).shape

    def grouped(t: Tensor) -> Tensor:
        return t.reshape(shape[0], num_groups, -1)

    x = Uncertain(grouped(input.mean), grouped(input.var)) if isinstance(input, Uncertain) else grouped(input)
    y = _standardized(x, 1, eps)
    y = Uncertain(y.mean.view(shape), y.var.view(shape)) if isinstance(y, Uncertain) else y.view(shape)
    return _transformed(y, weight, bias, lambda p: _by_channel(p, len(shape)))


def _standardized(x: Any, dims: int, eps: float, *, centered: bool = True) -> Any:
    r"""$\hat x = (x - \bar x) / \sqrt{\mathrm{var}(x) + \epsilon}$ over the last `dims` dimensions, or without $\bar x$.

    Its derivative, $(\delta_{ij} - a_{ij}) / \sqrt{\cdot}$ with $a_{ij} = (1 + \hat x_i \hat x_j) / n$, or without the
    1, gives the variance $\sum_j (\delta_{ij} - a_{ij})^2 v_j / (\cdot)$.
    """
    mean, over = mean_of(x), tuple(range(-dims, 0))
    n = math.prod(mean.shape[-dims:])
    away = mean - mean.mean(over, keepdim=True) if centered else mean
    squared = away.square().mean(over, keepdim=True) + eps
    normalized = away * squared.rsqrt()
    if not isinstance(x, Uncertain):
        return normalized
    one = 1.0 if centered else 0.0
    v, sums = x.var, [(x.var * normalized**k).sum(over, keepdim=True) for k in range(3)]
    twice_diagonal = 2 * (one + normalized.square()) / n
    rest = (one * sums[0] + 2 * one * normalized * sums[1] + normalized.square() * sums[2]) / n**2
    return Uncertain(normalized, (v * (1 - twice_diagonal) + rest).clamp_min(0) / squared)


def _transformed(x: Any, weight: Parameter, bias: Parameter, shaped: Any) -> Any:
    """X·weight + bias."""

    def seen(parameter: Parameter) -> Any:
        if isinstance(parameter, Uncertain):
            return Uncertain(shaped(parameter.mean), shaped(parameter.var))
        return shaped(parameter)

    if weight is not None:
        x = _either(mul, torch.mul, x, seen(weight))
    return x if bias is None else _either(add, torch.add, x, seen(bias))


def _either(rule_of: Any, op: Op, x: Any, y: Any) -> Any:
    """By the rule, or of two tensors by the operation itself."""
    return rule_of(op, x, y) if isinstance(x, Uncertain) or isinstance(y, Uncertain) else op(x, y)
