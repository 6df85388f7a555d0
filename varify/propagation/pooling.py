"""Pooling: averages exactly, of independent elements; maxima by the element that is the largest in the mean."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varify.propagation.rules import Op, Sizes, Uncertain, rule

_N: Any = torch._C._nn  # where torch has what `F` hands on

_WITH_INDICES = {"max_pool1d": F.max_pool1d, "max_pool2d": F.max_pool2d, "max_pool3d": F.max_pool3d}


@rule(*_WITH_INDICES, *_WITH_INDICES.values())
def max_pool(
    op: Op,
    input: Uncertain,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Uncertain:
    """The element of each window whose mean is the largest.

    The mean of a maximum is at least that, and its variance is usually less; both errors vanish where one element
    stands out by more than its standard deviation.
    """
    pool: Any = _WITH_INDICES[op.__name__]
    settings = (kernel_size, stride or None, padding, dilation, ceil_mode)
    mean, indices = pool(input.mean, *settings, return_indices=True)
    return Uncertain(mean, _at(input.var, indices, int(op.__name__[-2])))


@rule(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
def adaptive_max_pool(op: Op, input: Uncertain, output_size: Sizes, return_indices: bool = False) -> Uncertain:
    """See `max_pool`."""
    mean, indices = op(input.mean, output_size, return_indices=True)
    return Uncertain(mean, _at(input.var, indices, int(op.__name__[-2])))


def _at(var: Tensor, indices: Tensor, dims: int) -> Tensor:
    return var.flatten(-dims).gather(-1, indices.flatten(-dims)).view_as(indices)


@rule(torch.avg_pool1d, _N.avg_pool2d, _N.avg_pool3d)
def avg_pool(op: Op, input: Uncertain, kernel_size: Sizes, *settings: object, **named: object) -> Uncertain:
    """Each output is a sum over d, where d may differ at borders: its variance is the same sum of variances over d²."""
    dims = int(op.__name__[-2])
    ones = torch.ones((1, *input.mean.shape[-dims:]), dtype=input.mean.dtype, device=input.mean.device)
    names = ("stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given = dict(zip(names, settings, strict=False)) | named
    share: Tensor = op(ones, kernel_size, **given)  # elements within a window, over d
    inverse = share / _counts(ones, kernel_size, given, dims)
    return Uncertain(
        op(input.mean, kernel_size, **given), op(input.var, kernel_size, **given) * inverse.view(inverse.shape[-dims:])
    )


def _counts(ones: Tensor, kernel_size: Sizes, given: dict[str, Any], dims: int) -> Tensor:
    """The number of elements in each window."""
    stride, padding = given.get("stride") or kernel_size, given.get("padding", 0)
    ceil = given.get("ceil_mode", False)
    if dims == 3:
        return F.avg_pool3d(ones, kernel_size, stride, padding, ceil, divisor_override=1)
    if dims == 2:
        return F.avg_pool2d(ones, kernel_size, stride, padding, ceil, divisor_override=1)
    (k,), (s,), (p,) = (tuple(x) if isinstance(x, (tuple, list)) else (x,) for x in (kernel_size, stride, padding))
    return F.avg_pool2d(ones.unsqueeze(-2), (1, k), (1, s), (0, p), ceil, divisor_override=1).squeeze(-2)


@rule(torch.adaptive_avg_pool1d, _N.adaptive_avg_pool2d, _N.adaptive_avg_pool3d)
def adaptive_avg_pool(op: Op, input: Uncertain, output_size: Sizes) -> Uncertain:
    """A mean of n elements has their mean variance over n; n differs where the output's size does not divide."""
    mean: Tensor = op(input.mean, output_size)
    dims = int(op.__name__[-2])
    var: Tensor = op(input.var, output_size)
    for dim in range(-dims, 0):
        size, outputs = input.mean.shape[dim], mean.shape[dim]
        lengths = [math.ceil((i + 1) * size / outputs) - i * size // outputs for i in range(outputs)]
        var = var / torch.tensor(lengths, dtype=var.dtype, device=var.device).view(-1, *(1,) * (-dim - 1))
    return Uncertain(mean, var)
