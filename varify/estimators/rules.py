"""How an operation meets a posterior without drawing the weights: rules by estimator and operation.

A rule is a decorated pure function. It takes the operation, then the operation's own arguments under their own names,
with `Moments` where a posterior stands in for a parameter, and returns a random output whose mean and variance are
those of many drawn weights:

```python
@rule("local", torch.bmm, of=("mat2",))
def local_bmm(op, input, mat2): ...
```
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varify.errors import EstimatorError
from varify.weights.moments import Examples, Moments

NAMES = ("weights", "local", "flipout", "auto")
# What `variationalize` takes for an estimator: one of these names, or that of a custom rule.
EstimatorLike = str
LINEAR = (F.linear,)
CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)


def canonical(operation: Any) -> Any:
    """What rules are kept under: `torch.add`, `operator.add`, and the method "add" are one operation, "add"."""
    if isinstance(operation, torch._ops.OpOverload):  # of a graph of torch.export
        operation = _OF_ATEN.get(operation.overloadpacket.__name__, operation)
    name = operation if isinstance(operation, str) else getattr(operation, "__name__", "")
    return name if name in _BY_NAME else operation


_BY_NAME = frozenset({"add", "addmm", "matmul", "mm", "mul"})
_OF_ATEN = {op.__name__: op for op in (*LINEAR, *CONVOLUTIONS)} | {name: name for name in _BY_NAME}


@dataclass(frozen=True)
class Rule:
    """A rule for one operation, and which of its arguments it can take moments for.

    Attributes:
        function: the rule, to be called with `Examples` and the operation's arguments.
        signature: of the operation.
        of: the arguments that an estimator may be asked for: one of them must be moments.
        along: further ones, such as a bias, that may be moments too.
        refuses: from the operation's arguments, or what has their shapes, to a reason why the rule is not for them.
        uses: likewise, to how often the operation uses an element of the parameter; None if that depends.
    """

    function: Callable[..., Tensor]
    signature: inspect.Signature
    of: tuple[str, ...]
    along: tuple[str, ...]
    refuses: Callable[[dict[str, Any]], str | None]
    uses: Callable[[dict[str, Any]], int | None]

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The operation's arguments by name.

        Raises:
            TypeError: the rule knows no such arguments.
        """
        if not kwargs and len(self.named) >= len(args):
            return dict(zip(self.named, args, strict=False))  # as `bind` has it, in a tenth of the time
        return dict(self.signature.bind(*args, **kwargs).arguments)

    @functools.cached_property
    def named(self) -> list[str]:
        """Names of the arguments that may be given by position, as far as each has one."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return [name for name, parameter in self.signature.parameters.items() if parameter.kind in kinds]


_RULES: dict[tuple[str, Any], Rule] = {}


def rule(
    estimator: str,
    *operations: Any,
    of: tuple[str, ...] = ("weight",),
    along: tuple[str, ...] = (),
    refuses: Callable[[dict[str, Any]], str | None] = lambda arguments: None,
    uses: Callable[[dict[str, Any]], int | None] = lambda arguments: None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorate the rule of an estimator for one or more operations; see `Rule` for the keywords."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        for operation in operations:
            signature = inspect.signature(function)
            signature = signature.replace(parameters=list(signature.parameters.values())[1:])
            made = Rule(_for(operation, function, estimator), signature, of, along, refuses, uses)
            _RULES[estimator, canonical(operation)] = made
        return function

    return register


def _for(operation: Any, function: Callable[..., Tensor], estimator: str) -> Callable[..., Tensor]:
    """The rule with its operation given, under a name that reads well in a graph."""
    op = getattr(torch, operation) if isinstance(operation, str) else operation

    def of_operation(examples: Examples, *args: Any, **kwargs: Any) -> Tensor:
        given = [a.at(examples) if isinstance(a, Moments) else a for a in args]
        named = {k: a.at(examples) if isinstance(a, Moments) else a for k, a in kwargs.items()}
        return function(op, *given, **named)

    of_operation.__name__ = of_operation.__qualname__ = f"{estimator}_{op.__name__}"
    return of_operation


def has_rule(operation: Any) -> bool:
    """Whether any estimator has a rule for the operation."""
    wanted = canonical(operation)
    return any(known == wanted for _, known in _RULES)


def find_rule(estimator: str, operation: Any) -> Rule | None:
    """The rule, or None where the operation has none."""
    return _RULES.get((estimator, canonical(operation)))


def check_estimator(estimator: Any) -> str:
    """The name of an estimator.

    Raises:
        EstimatorError: there is none of that name.
    """
    known = {*NAMES, *(name for name, _ in _RULES)}
    if not isinstance(estimator, str) or estimator not in known:
        raise EstimatorError(f"estimator must be one of {', '.join(map(repr, sorted(known)))}, got {estimator!r}")
    return estimator
