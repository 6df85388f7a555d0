"""Sums, differences, products and quotients, element by element; both arguments are taken for independent.

That neglects what they share: in `x + f(x)`, a residual connection, the variances add although f(x) depends on x. An
argument that meets itself, as in `x + x` and `x * x`, is known for itself.
"""

import torch
from torch import Tensor

from varify.propagation.products import product
from varify.propagation.rules import Op, Operand, Uncertain, mean_of, refuse_unless, rule, var_of


def sum_of(x: object, y: object, alpha: float = 1) -> Uncertain:
    """`x + alpha * y`."""
    if x is y and isinstance(x, Uncertain):
        return Uncertain(x.mean * (1 + alpha), x.var * (1 + alpha) ** 2)
    mean: Tensor = torch.add(mean_of(x), mean_of(y), alpha=alpha)
    ours, others = var_of(x), var_of(y)
    if ours is None or others is None:
        var = others * alpha**2 if ours is None else ours
        return Uncertain(mean, var.expand(mean.shape))
    return Uncertain(mean, torch.add(ours, others, alpha=alpha**2))


@rule(torch.add)
def add(op: Op, input: object, other: object, *, alpha: float = 1) -> Uncertain:
    """`input + alpha * other`."""
    return sum_of(input, other, alpha)


@rule(torch.sub)
def sub(op: Op, input: object, other: object, *, alpha: float = 1) -> Uncertain:
    """`input - alpha * other`."""
    return sum_of(input, other, -alpha)


@rule("__rsub__")
def rsub(op: Op, input: Uncertain, other: object) -> Uncertain:
    """`other - input`."""
    negative = neg(torch.neg, input)
    return sum_of(negative, other, 1)


@rule(torch.neg, torch.negative)
def neg(op: Op, input: Uncertain) -> Uncertain:
    """`-input`."""
    return Uncertain(-input.mean, input.var)


@rule(torch.mul)
def mul(op: Op, input: Operand, other: Operand) -> Operand:
    """`input * other`."""
    if input is other and isinstance(input, Uncertain):
        return square(op, input)
    if isinstance(input, Uncertain) and not isinstance(other, (Uncertain, Tensor)):
        return Uncertain(input.mean * other, input.var * other**2)
    return product(torch.mul, input, other)


@rule(torch.div, torch.true_divide, "__truediv__")
def div(op: Op, input: Uncertain, other: Operand, *, rounding_mode: str | None = None) -> Uncertain:
    """`input / other`, of which the first is uncertain alone."""
    refuse_unless(rounding_mode is None, f"it rounds (rounding_mode={rounding_mode!r})")
    refuse_unless(not isinstance(other, Uncertain), "the ratio to what is Gaussian has no mean")
    divisor = mean_of(other)
    return Uncertain(input.mean / divisor, input.var / divisor**2)


@rule(torch.square)
def square(op: Op, input: Uncertain) -> Uncertain:
    """x², exactly: mean m² + v, variance 2v² + 4m²v."""
    return Uncertain(input.second, 2 * input.var.square() + 4 * input.mean.square() * input.var)


@rule(torch.pow)
def power(op: Op, input: Uncertain, exponent: object) -> Uncertain:
    """x²; of other powers x alone."""
    refuse_unless(isinstance(input, Uncertain) and exponent in (1, 2), "the rule is for x ** 2 alone")
    return input if exponent == 1 else square(op, input)


@rule(torch.sum)
def total(op: Op, input: Uncertain, *settings: object, **named: object) -> Uncertain:
    """A sum of independent elements."""
    return Uncertain(op(input.mean, *settings, **named), op(input.var, *settings, **named))


@rule(torch.mean)
def average(op: Op, input: Uncertain, *settings: object, **named: object) -> Uncertain:
    """A mean of n independent elements has their mean variance over n."""
    mean, var = op(input.mean, *settings, **named), op(input.var, *settings, **named)
    return Uncertain(mean, var * (max(1, mean.numel()) / max(1, input.mean.numel())))
