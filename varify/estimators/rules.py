"""The registry of rules, which run an operation on the moments of its weights instead of a draw.

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
# An estimator in `variationalize`: one of these names, or that of a custom rule.
EstimatorLike = str
# What a rule is given to call: the operation itself.
Op = Callable[..., Tensor]
LINEAR = (F.linear,)
CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)


def canonical(operation: object) -> Any:
    """The key of an operation in the registry: `torch.add`, `operator.add` and the method "add" have one, "add"."""
    if isinstance(operation, torch._ops.OpOverload):  # in a graph of torch.export
        operation = _OF_ATEN.get(operation.overloadpacket.__name__, operation)
    name = operation if isinstance(operation, str) else getattr(operation, "__name__", "")
    return name if name in _BY_NAME else operation


_BY_NAME = frozenset({"add", "addmm", "matmul", "mm", "mul"})
_OF_ATEN = {op.__name__: op for op in (*LINEAR, *CONVOLUTIONS)} | {name: name for name in _BY_NAME}


@dataclass(frozen=True)
class Rule:
    """A rule for one operation, and the arguments for which it takes moments.

    Attributes:
        function: the rule, to be called with `Examples` and the operation's arguments.
        signature: of the operation.
        of: arguments that may be moments; at least one of them is.
        along: further arguments that may be moments then, such as a bias.
        refuses: from the operation's arguments, or objects of their shapes, to the reason why the rule does not serve
            them; None if it does.
        uses: likewise, to how often the operation uses each element of the parameter; None if that is unknown.
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
            TypeError: they do not fit the rule's signature.
        """
        if not kwargs and len(self.named) >= len(args):
            return dict(zip(self.named, args, strict=False))  # the same as by `bind`, in a tenth of the time
        return dict(self.signature.bind(*args, **kwargs).arguments)

    @functools.cached_property
    def named(self) -> list[str]:
        """Names of the positional arguments, up to a `*args`."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return [name for name, parameter in self.signature.parameters.items() if parameter.kind in kinds]


_RULES: dict[tuple[str, Any], Rule] = {}


def rule(
    estimator: str,
    *operations: object,
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
            bound = _bound(operation, function, estimator)
            _RULES[estimator, canonical(operation)] = Rule(bound, signature, of, along, refuses, uses)
        return function

    return register


def _bound(operation: Any, function: Callable[..., Tensor], estimator: str) -> Callable[..., Tensor]:
    """The rule as a function of examples and arguments, named `<estimator>_<operation>` for the code of graphs."""
    op = getattr(torch, operation) if isinstance(operation, str) else operation

    def of_operation(examples: Examples, *args: object, **kwargs: object) -> Tensor:
        positional = [a.at(examples) if isinstance(a, Moments) else a for a in args]
        named = {k: a.at(examples) if isinstance(a, Moments) else a for k, a in kwargs.items()}
        return function(op, *positional, **named)

    of_operation.__name__ = of_operation.__qualname__ = f"{estimator}_{op.__name__}"
    return of_operation


def has_rule(operation: object) -> bool:
    """Whether any estimator has a rule for the operation."""
    key = canonical(operation)
    return any(known == key for _, known in _RULES)


def find_rule(estimator: str, operation: object) -> Rule | None:
    """The rule of an estimator for an operation; None if there is none."""
    return _RULES.get((estimator, canonical(operation)))


def check_estimator(estimator: object) -> str:
    """Check the name of an estimator and return it.

    Raises:
        EstimatorError: it is unknown.
    """
    known = {*NAMES, *(name for name, _ in _RULES)}
    if not isinstance(estimator, str) or estimator not in known:
        raise EstimatorError(f"estimator must be one of {', '.join(map(repr, sorted(known)))}, got {estimator!r}")
    return estimator
