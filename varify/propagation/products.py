r"""Operations that are linear in each of two independent arguments: products of data and weights, or of data.

With $y = \sum_i x_i w_i$: $E[y] = \sum E[x_i] E[w_i]$ and
$\mathrm{Var}[y] = \sum E[x_i^2] \mathrm{Var}[w_i] + \mathrm{Var}[x_i] E[w_i]^2$ (Wu et al. 2019, arXiv:1810.03958,
eq. 5; Roth & Pernkopf 2016). Both are exact where the terms of the sum are independent.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varify.propagation.rules import Op, Operand, Uncertain, mean_of, refuse_unless, rule, square_of, var_of

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)


def variance_of_product(op: Callable[[Tensor, Tensor], Tensor], x: Operand, w: Operand) -> Tensor:
    """The variance of `op(x, w)`, which sums products of an element of each; one of them at least is uncertain."""
    if isinstance(x, Uncertain) and isinstance(w, Uncertain):
        return op(x.second, w.var) + op(x.var, square_of(w))
    return op(x.var, square_of(w)) if isinstance(x, Uncertain) else op(square_of(x), var_of(w))


def product(op: Callable[[Tensor, Tensor], Tensor], x: Operand, w: Operand) -> Operand:
    """`op(x, w)` of two independent arguments, which sums products of an element of each."""
    mean = op(mean_of(x), mean_of(w))
    is_random = isinstance(x, Uncertain) or isinstance(w, Uncertain)
    return Uncertain(mean, variance_of_product(op, x, w)) if is_random else mean


def plus(var: Tensor, other: Tensor | None) -> Tensor:
    """Their sum, where there is another."""
    return var if other is None else var + other


@rule(F.linear, *_CONVOLUTIONS, *_TRANSPOSED)
def affine(
    op: Op, input: Operand, weight: Operand, bias: object = None, *settings: object, **named: object
) -> Uncertain:
    """Linear maps and convolutions; exact for a single output where the elements of the input are independent."""
    mean = op(mean_of(input), mean_of(weight), mean_of(bias), *settings, **named)
    extra = var_of(bias)
    if not isinstance(input, Uncertain) and not isinstance(weight, Uncertain):  # all that is uncertain is the bias
        return Uncertain(mean, _along(mean, op, extra).expand_as(mean))
    if isinstance(input, Uncertain) and isinstance(weight, Uncertain):
        var = op(input.second, weight.var, extra, *settings, **named)
        return Uncertain(mean, var.add_(op(input.var, square_of(weight), None, *settings, **named)))
    if isinstance(input, Uncertain):
        return Uncertain(mean, op(input.var, square_of(weight), extra, *settings, **named))
    return Uncertain(mean, op(square_of(input), var_of(weight), extra, *settings, **named))


def _along(mean: Tensor, op: Op, bias: Tensor) -> Tensor:
    """A bias to broadcast along the output's channels."""
    if op is F.linear:
        return bias
    positions = {1: 1, 2: 2, 3: 3}[int(op.__name__[-2])]
    return bias.reshape(-1, *(1,) * positions)


@rule(torch.matmul, torch.mm, torch.bmm, torch.mv, torch.dot, "__matmul__")
def matmul(op: Op, input: Operand, other: Operand) -> Operand:
    """Matrix products; either side, or both, may be uncertain."""
    return product(op, input, other)


@rule("__rmatmul__")
def rmatmul(op: Op, input: Operand, other: Operand) -> Operand:
    """`other @ input`."""
    return product(torch.matmul, other, input)


@rule(torch.addmm, torch.baddbmm, torch.addmv)
def addmm(op: Op, input: Operand, first: Operand, second: Operand, *, beta: float = 1, alpha: float = 1) -> Uncertain:
    """`beta * input + alpha * first @ second`."""
    mean = op(mean_of(input), mean_of(first), mean_of(second), beta=beta, alpha=alpha)
    extra = var_of(input)
    if not isinstance(first, Uncertain) and not isinstance(second, Uncertain):
        return Uncertain(mean, (extra * beta**2).expand_as(mean))
    var = variance_of_product(torch.matmul, first, second) * alpha**2
    return Uncertain(mean, plus(var, None if extra is None else extra * beta**2))


@rule(torch.einsum)
def einsum(op: Op, equation: str, *operands: Any) -> Operand:
    """Sums of products of two arguments."""
    found: Any = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    refuse_unless(len(found) == 2, f"it has {len(found)} operands, and the rule is for two")
    x, w = found
    return product(lambda a, b: op(equation, a, b), x, w)


@rule(F.bilinear)
def bilinear(op: Op, input1: Operand, input2: Operand, weight: Operand, bias: object = None) -> Uncertain:
    """x₁ᵀ w x₂, in two products; the second is exact unless x₁ and x₂ are both uncertain."""
    mean = op(*(mean_of(a) for a in (input1, input2, weight, bias)))
    # first with the input that is not random: of the other, each element must meet the sums once
    first, other, equations = (input1, input2, ("...i,oij->...oj", "...oj,...j->...o"))
    if not isinstance(input2, Uncertain):
        first, other, equations = (input2, input1, ("...j,oij->...oi", "...oi,...i->...o"))
    inner = product(lambda x, w: torch.einsum(equations[0], x, w), first, weight)
    var = var_of(product(lambda x, w: torch.einsum(equations[1], x, w), inner, other))
    return Uncertain(mean, plus(torch.zeros_like(mean) if var is None else var, var_of(bias)))


@rule(torch.embedding)
def embedding(op: Op, weight: Uncertain, indices: Tensor, *settings: object, **named: object) -> Uncertain:
    """The rows looked up, which is exact; that a row looked up twice is one row is neglected."""
    return Uncertain(op(weight.mean, indices, *settings, **named), op(weight.var, indices, *settings, **named))
