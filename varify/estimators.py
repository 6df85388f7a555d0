"""How an operation meets a posterior without drawing the weights: rules by estimator and operation.

A rule is a decorated pure function. It takes the operation, then the operation's own arguments under their own names,
with `Moments` where a posterior stands in for a parameter, and returns a random output whose mean and variance are
those of many drawn weights:

```python
@rule("local", torch.bmm, of=("mat2",))
def local_bmm(op, input, mat2): ...
```
"""

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from varify.errors import EstimatorError

NAMES = ("weights", "local", "flipout", "auto")
LINEAR = (F.linear,)
CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
MATMUL = (torch.matmul, operator.matmul, "matmul")  # a str is a tensor's method


class Moments(NamedTuple):
    """Mean and standard deviation of a parameter, each `(*shape)`: what a program is given in place of a draw.

    `mu` has the network's dtype, `sigma` single precision or better.
    """

    mu: Tensor
    sigma: Tensor

    def var(self, scale: Tensor | float = 1.0) -> Tensor:
        """(sigma/scale)², in the network's dtype."""
        return (self.sigma / scale).square().to(self.mu.dtype)

    def perturbation(self) -> Tensor:
        """sigma·eps, eps ~ N(0, 1), in the network's dtype."""
        return (self.sigma * torch.randn_like(self.sigma)).to(self.mu.dtype)


@dataclass(frozen=True)
class Rule:
    """A rule for one operation, and which of its arguments it can take moments for.

    Attributes:
        function: the rule, to be called with the operation's arguments.
        of: the arguments that an estimator may be asked for: one of them must be moments.
        along: further ones, such as a bias, that may be moments too.
        refuses: from the operation's arguments to a reason why the rule is not for them, or None.
    """

    function: Callable[..., Tensor]
    of: tuple[str, ...]
    along: tuple[str, ...]
    refuses: Callable[[dict[str, Any]], str | None]

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The operation's arguments by name."""
        return dict(inspect.signature(self.function).bind(*args, **kwargs).arguments)


_RULES: dict[tuple[str, Any], Rule] = {}


def rule(
    estimator: str,
    *operations: Any,
    of: tuple[str, ...] = ("weight",),
    along: tuple[str, ...] = (),
    refuses: Callable[[dict[str, Any]], str | None] = lambda arguments: None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorate the rule of an estimator for one or more operations; see `Rule` for the keywords."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        for operation in operations:
            _RULES[estimator, operation] = Rule(_for(operation, function, estimator), of, along, refuses)
        return function

    return register


def _for(operation: Any, function: Callable[..., Tensor], estimator: str) -> Callable[..., Tensor]:
    """The rule with its operation given, under a name that reads well in a program."""
    op = getattr(torch.Tensor, operation) if isinstance(operation, str) else operation
    parameters = list(inspect.signature(function).parameters.values())[1:]

    def of_operation(*args: Any, **kwargs: Any) -> Tensor:
        return function(op, *args, **kwargs)

    of_operation.__name__ = of_operation.__qualname__ = f"{estimator}_{op.__name__}"
    of_operation.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return of_operation


def find(estimator: str, operation: Any) -> Rule | None:
    """The rule, or None where the operation has none."""
    return _RULES.get((estimator, operation))


def check(estimator: Any) -> str:
    """The name of an estimator.

    Raises:
        EstimatorError: there is none of that name.
    """
    known = {*NAMES, *(name for name, _ in _RULES)}
    if not isinstance(estimator, str) or estimator not in known:
        raise EstimatorError(f"estimator={estimator!r}: one of {', '.join(sorted(known))} is needed")
    return estimator


def automatic(operation: Any, input_dim: int) -> str:
    """What "auto" takes: the least gradient variance of what is exact for this use.

    Local reparameterization where a weight is used once per datum, which is a linear map of `(batch, features)`;
    flipout where it is used at several positions of one datum.
    """
    once_per_datum = (*LINEAR, *MATMUL, F.bilinear)
    return "local" if input_dim <= 2 and operation in once_per_datum else "flipout"


# --- local reparameterization (Kingma, Salimans & Welling 2015, arXiv:1506.02557)


def _with_noise(mean: Tensor, var: Tensor) -> Tensor:
    # The square root has an infinite slope at 0, where no input or no sigma reaches an output: there the noise is 0.
    std = torch.where(var > 0, var.clamp_min(torch.finfo(var.dtype).tiny).sqrt(), 0.0)
    return mean + std.to(mean.dtype) * torch.randn_like(mean)


def _scale(like: Tensor, sigma: Tensor) -> Tensor | float:
    """What to divide sigma by, so that its square can be told from 0 in half precision."""
    kind = like.device.type
    half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
    return sigma.detach().amax().clamp_min(torch.finfo(torch.float32).tiny) if half == torch.float16 else 1.0


def _mean_of(parameter: Any) -> Any:
    return parameter.mu if isinstance(parameter, Moments) else parameter


@rule("local", *LINEAR, *CONVOLUTIONS, *TRANSPOSED, along=("bias",))
def local_affine(op: Any, input: Tensor, weight: Moments, bias: Any = None, *settings: Any, **named: Any) -> Tensor:
    """Mean = op(x, mu), variance = op(x², sigma²), the bias' variance added; one noise per output element.

    Right for each output by itself; on convolutions and sequences the correlations between positions are dropped.
    """
    mean = op(input, weight.mu, _mean_of(bias), *settings, **named)
    scale = _scale(input, weight.sigma)
    bias_var = bias.var(scale) if isinstance(bias, Moments) else None
    var = op(input.square(), weight.var(scale), bias_var, *settings, **named)
    return _with_noise(mean, var.float() * scale**2 if isinstance(scale, Tensor) else var)


@rule("local", *MATMUL, of=("input", "other"))
def local_matmul(op: Any, input: Any, other: Any) -> Tensor:
    """`x @ w` and `w @ x` with one noise per output element."""
    product = torch.matmul
    mean = product(_mean_of(input), _mean_of(other))
    left, right = (p.var() if isinstance(p, Moments) else p.square() for p in (input, other))
    return _with_noise(mean, product(left, right))


@rule("local", F.bilinear, along=("bias",))
def local_bilinear(op: Any, input1: Tensor, input2: Tensor, weight: Moments, bias: Any = None) -> Tensor:
    """x₁ᵀ w x₂ is linear in w: its variance is that of the squares."""
    mean = op(input1, input2, weight.mu, _mean_of(bias))
    bias_var = bias.var() if isinstance(bias, Moments) else None
    return _with_noise(mean, op(input1.square(), input2.square(), weight.var(), bias_var))


def _renormalised(arguments: dict[str, Any]) -> str | None:
    return "max_norm depends on the drawn rows" if arguments["settings"].get("max_norm") is not None else None


@rule("local", F.embedding, refuses=_renormalised)
def local_embedding(op: Any, input: Tensor, weight: Moments, **settings: Any) -> Tensor:
    """Noise for the rows looked up alone; a row that is looked up twice gets two noises."""
    mean: Tensor = op(input, weight.mu, **settings)
    sigma: Tensor = op(input, weight.sigma, **settings)
    return mean + (sigma * torch.randn_like(sigma)).to(mean.dtype)


# --- flipout (Wen, Vicol, Ba, Tran & Grosse 2018, arXiv:1803.04386)


def _signs(like: Tensor, channel_dim: int, batched: bool) -> Tensor:
    """Random signs per example (dimension 0) and channel, constant over all other positions."""
    channel_dim %= like.dim()
    kept = {channel_dim, 0} if batched else {channel_dim}
    shape = [size if dim in kept else 1 for dim, size in enumerate(like.shape)]
    return torch.randint(0, 2, shape, device=like.device).to(like.dtype).mul_(2).sub_(1)


@rule("flipout", *LINEAR, *CONVOLUTIONS, *TRANSPOSED, along=("bias",))
def flipout_affine(op: Any, input: Tensor, weight: Moments, bias: Any = None, *settings: Any, **named: Any) -> Tensor:
    """op(x, mu) + s·op(r·x, delta): one perturbation delta = sigma·eps a call, with each example's own signs r and s.

    The signs are constant over positions, so every example sees one drawn weight at all its positions.
    """
    channel_dim = -1 if op in LINEAR else 1 - weight.mu.dim()
    batched = input.dim() > -channel_dim
    mean: Tensor = op(input, weight.mu, _mean_of(bias), *settings, **named)
    delta = bias.perturbation() if isinstance(bias, Moments) else None
    flipped = input * _signs(input, channel_dim, batched)
    perturbed: Tensor = op(flipped, weight.perturbation(), delta, *settings, **named)
    return mean + perturbed * _signs(perturbed, channel_dim, batched)


def _not_a_matrix_on_the_right(arguments: dict[str, Any]) -> str | None:
    other = arguments.get("other")
    return None if isinstance(other, Tensor) and other.dim() == 2 else "flipout takes x @ w with a matrix w alone"


@rule("flipout", *MATMUL, of=("other",), refuses=_not_a_matrix_on_the_right)
def flipout_matmul(op: Any, input: Tensor, other: Moments) -> Tensor:
    """`x @ w` is a linear layer whose weight is wᵀ."""
    return flipout_affine(F.linear, input, Moments(other.mu.T, other.sigma.T))


@rule("flipout", F.bilinear, along=("bias",))
def flipout_bilinear(op: Any, input1: Tensor, input2: Tensor, weight: Moments, bias: Any = None) -> Tensor:
    """Signs of each example's own on both inputs and the output."""
    mean: Tensor = op(input1, input2, weight.mu, _mean_of(bias))
    delta = bias.perturbation() if isinstance(bias, Moments) else None
    flipped = [x * _signs(x, -1, x.dim() > 1) for x in (input1, input2)]
    perturbed: Tensor = op(*flipped, weight.perturbation(), delta)
    return mean + perturbed * _signs(perturbed, -1, perturbed.dim() > 1)


@rule("flipout", F.embedding, refuses=_renormalised)
def flipout_embedding(op: Any, input: Tensor, weight: Moments, **settings: Any) -> Tensor:
    """Signs of each example's own on the embedding's dimensions: a row looked up twice by it gets one noise."""
    mean: Tensor = op(input, weight.mu, **settings)
    perturbed: Tensor = op(input, weight.perturbation(), **settings)
    return mean + perturbed * _signs(perturbed, -1, perturbed.dim() > 1)
