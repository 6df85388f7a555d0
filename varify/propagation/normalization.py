"""Normalization. That of a batch is affine in eval mode; that of a layer or group is taken to first order."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from varify.propagation.arithmetic import sum_of
from varify.propagation.products import product
from varify.propagation.rules import Op, Operand, Uncertain, mean_of, refuse_unless, rule

Parameter = Operand | None


@rule(F.batch_norm)
def batch_norm(
    op: Op,
    input: Operand,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Parameter = None,
    bias: Parameter = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Operand:
    """Exactly, by the running statistics."""
    refuse_unless(
        not training and running_mean is not None, "it normalizes by the statistics of the batch, in eval mode as well"
    )
    x = mean_of(input)
    normalized: Operand = op(x, running_mean, running_var, eps=eps)
    if isinstance(input, Uncertain):
        assert running_var is not None
        normalized = Uncertain(mean_of(normalized), input.var / _by_channel(running_var + eps, x.dim()))
    return _transformed(normalized, weight, bias, lambda p: _by_channel(p, x.dim()))


def _by_channel(parameter: Tensor, dims: int) -> Tensor:
    return parameter.view(-1, *(1,) * (dims - 2))


@rule(torch.layer_norm)
def layer_norm(
    op: Op,
    input: Operand,
    normalized_shape: Sequence[int],
    weight: Parameter = None,
    bias: Parameter = None,
    eps: float = 1e-5,
    *_: object,
) -> Operand:
    """To first order in the input's deviation from its mean."""
    return _transformed(_standardized(input, len(normalized_shape), eps), weight, bias, lambda p: p)


@rule(torch.rms_norm)
def rms_norm(
    op: Op, input: Operand, normalized_shape: Sequence[int], weight: Parameter = None, eps: float | None = None
) -> Operand:
    """To first order in the input's deviation from its mean."""
    least = torch.finfo(mean_of(input).dtype).eps if eps is None else eps
    return _transformed(_standardized(input, len(normalized_shape), least, centered=False), weight, None, lambda p: p)


@rule(torch.group_norm)
def group_norm(
    op: Op,
    input: Operand,
    num_groups: int,
    weight: Parameter = None,
    bias: Parameter = None,
    eps: float = 1e-5,
    *_: object,
) -> Operand:
    """To first order in the input's deviation from its mean."""
    shape = mean_of(input).shape

    def grouped(t: Tensor) -> Tensor:
        return t.reshape(shape[0], num_groups, -1)

    y = _standardized(_mapped(grouped, input), 1, eps)
    return _transformed(_mapped(lambda t: t.view(shape), y), weight, bias, lambda p: _by_channel(p, len(shape)))


def _standardized(x: Operand, dims: int, eps: float, *, centered: bool = True) -> Operand:
    r"""$\hat x = (x - \bar x) / \sqrt{\mathrm{var}(x) + \epsilon}$ over `dims` last dimensions, or without $\bar x$.

    Its derivative, $(\delta_{ij} - a_{ij}) / \sqrt{\cdot}$ with $a_{ij} = (1 + \hat x_i \hat x_j) / n$, or without the
    1, gives the variance $\sum_j (\delta_{ij} - a_{ij})^2 v_j / (\cdot)$.
    """
    mean, over = mean_of(x), tuple(range(-dims, 0))
    n = math.prod(mean.shape[-dims:])
    away = mean - mean.mean(over, keepdim=True) if centered else mean
    squared = away.square().mean(over, keepdim=True) + eps
    normalized: Tensor = away * squared.rsqrt()
    if not isinstance(x, Uncertain):
        return normalized
    one = 1.0 if centered else 0.0
    v, sums = x.var, [(x.var * normalized**k).sum(over, keepdim=True) for k in range(3)]
    twice_diagonal = 2 * (one + normalized.square()) / n
    rest = (one * sums[0] + 2 * one * normalized * sums[1] + normalized.square() * sums[2]) / n**2
    return Uncertain(normalized, (v * (1 - twice_diagonal) + rest).clamp_min(0) / squared)


def _mapped(function: Callable[[Tensor], Tensor], x: Operand) -> Operand:
    """The function of a tensor, or of mean and variance alike."""
    return Uncertain(function(x.mean), function(x.var)) if isinstance(x, Uncertain) else function(x)


def _transformed(x: Operand, weight: Parameter, bias: Parameter, shaped: Callable[[Tensor], Tensor]) -> Operand:
    """`x * weight + bias`."""
    if weight is not None:
        x = product(torch.mul, x, _mapped(shaped, weight))
    if bias is None:
        return x
    shift = _mapped(shaped, bias)
    return sum_of(x, shift) if isinstance(x, Uncertain) or isinstance(shift, Uncertain) else x + shift
