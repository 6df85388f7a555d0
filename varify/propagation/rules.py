"""The registry of rules by which an operation takes Gaussians, a mean and a variance each, to a Gaussian.

A rule is a decorated pure function. It takes the operation, then the operation's own arguments, with an `Uncertain` in
the place of every tensor that is random; at least one is. It returns an `Uncertain`, or a tuple or list of them, or a
tensor where the result is not random:

```python
@rule(torch.cumsum)
def cumsum(op, input, dim):
    return Uncertain(op(input.mean, dim), op(input.var, dim))
```
"""

import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from varify.errors import PropagationError

# What a rule is given to call: the operation itself.
Op = Callable[..., Any]
Function = Callable[..., Any]
_Rule = TypeVar("_Rule", bound=Function)


class Uncertain:
    """Independent Gaussians: mean and variance, each `(*shape)`.

    Attributes:
        mean: of each element.
        var: variance of each element, at least 0.
    """

    __slots__ = ("mean", "var")

    def __init__(self, mean: Tensor, var: Tensor) -> None:
        self.mean, self.var = mean, var

    @property
    def second(self) -> Tensor:
        """The mean of the square, mean² + var."""
        return torch.addcmul(self.var, self.mean, self.mean)

    def __repr__(self) -> str:
        return f"Uncertain(shape={tuple(self.mean.shape)})"


# What a rule may meet as a value.
Operand = Tensor | Uncertain
# Of a kernel, a stride, an output: one for all dimensions, or one for each.
Sizes = int | list[int] | tuple[int, ...]


def mean_of(value: object) -> Any:
    """The mean of what is uncertain; any other argument unchanged."""
    return value.mean if isinstance(value, Uncertain) else value


def var_of(value: object) -> Any:
    """The variance of what is uncertain; None for any other argument."""
    return value.var if isinstance(value, Uncertain) else None


def with_var(value: Operand) -> Uncertain:
    """What is uncertain, or a tensor with variance 0."""
    return value if isinstance(value, Uncertain) else Uncertain(value, torch.zeros_like(value))


def square_of(value: Operand) -> Tensor:
    """The square of a tensor, or that of the mean of what is uncertain."""
    return (value.mean if isinstance(value, Uncertain) else value).square()


_RULES: dict[Any, Function] = {}


def canonical(operation: object) -> Any:
    """The key of an operation: the name of what torch implements in C, which `torch.add` and `Tensor.add` share.

    A function written in Python is its own key: `F.batch_norm` and `torch.batch_norm` differ in their arguments.
    """
    if isinstance(operation, str):
        return operation
    name = getattr(operation, "__name__", "")
    if name in ("__get__", "__set__"):
        return f"{name[2:5]} {getattr(getattr(operation, '__self__', None), '__name__', '')}"
    is_python = isinstance(operation, types.FunctionType) and operation.__module__ != "torch._tensor"
    return operation if is_python else name


def rule(*operations: object) -> Callable[[_Rule], _Rule]:
    """Decorate the rule of one or more operations.

    Args:
        operations: each a torch function, or the name of a tensor's method; the later rule of an operation counts.
    """

    def register(function: _Rule) -> _Rule:
        for operation in operations:
            _RULES[canonical(operation)] = function
        return function

    return register


def find_rule(operation: object) -> Function | None:
    """The rule of an operation; None if there is none."""
    return _RULES.get(canonical(operation))


def refuse_unless(holds: bool, why: str) -> None:
    """Raise a PropagationError that says why a rule does not serve its arguments, unless `holds`.

    What is said of the operation's name and of the place in the network is added by the caller of the rule.
    """
    if not holds:
        raise PropagationError(why)
