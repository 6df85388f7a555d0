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
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varify.errors import EstimatorError
from varify.moments import Examples, Moments

NAMES = ("weights", "local", "flipout", "auto")
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


def find(estimator: str, operation: Any) -> Rule | None:
    """The rule, or None where the operation has none."""
    return _RULES.get((estimator, canonical(operation)))


def check(estimator: Any) -> str:
    """The name of an estimator.

    Raises:
        EstimatorError: there is none of that name.
    """
    known = {*NAMES, *(name for name, _ in _RULES)}
    if not isinstance(estimator, str) or estimator not in known:
        raise EstimatorError(f"estimator={estimator!r}: one of {', '.join(sorted(known))} is needed")
    return estimator


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


def _rows(arguments: dict[str, Any]) -> int:
    """Of the input of a linear map: each uses every element of the weight once."""
    name = next(name for name in ("mat1", "input1", "input") if name in arguments)  # addmm has its bias for `input`
    return math.prod(arguments[name].shape[:-1])


def _rows_beside(arguments: dict[str, Any]) -> int | None:
    """Of x in `x @ w`; columns in `w @ x`."""
    left, right = arguments["input"].shape, arguments["other"].shape
    return math.prod(left[:-1]) if len(right) == 2 else math.prod(right) // left[-1] if len(left) == 2 else None


def _looked_up(arguments: dict[str, Any]) -> int:
    return math.prod(arguments["input"].shape)


def _broadcast(arguments: dict[str, Any]) -> int | None:
    """Where one argument has the result's shape; None where both are broadcast, as for an outer product."""
    shapes: list[tuple[int, ...]] = [tuple(getattr(arguments[name], "shape", ())) for name in ("input", "other")]
    sizes: list[int] = [math.prod(shape) for shape in shapes]
    if math.prod(torch.broadcast_shapes(*shapes)) != max(sizes):
        return None
    return max(sizes) // max(1, min(sizes))


@rule("local", *LINEAR, along=("bias",), uses=_rows)
@rule("local", *CONVOLUTIONS, *TRANSPOSED, along=("bias",))
def local_affine(op: Any, input: Tensor, weight: Moments, bias: Any = None, *settings: Any, **named: Any) -> Tensor:
    """Mean = op(x, mu), variance = op(x², sigma²), the bias' variance added; one noise per output element.

    Right for each output by itself; on convolutions and sequences the correlations between positions are dropped.
    """
    mean = op(input, weight.mu, _mean_of(bias), *settings, **named)
    scale = _scale(input, weight.sigma)
    bias_var = bias.var(scale) if isinstance(bias, Moments) else None
    var = op(input.square(), weight.var(scale), bias_var, *settings, **named)
    return _with_noise(mean, var.float() * scale**2 if isinstance(scale, Tensor) else var)


@rule("local", "matmul", "mm", of=("input", "other"), uses=_rows_beside)
def local_matmul(op: Any, input: Any, other: Any) -> Tensor:
    """`x @ w` and `w @ x` with one noise per output element."""
    mean: Tensor = op(_mean_of(input), _mean_of(other))
    left, right = (p.var() if isinstance(p, Moments) else p.square() for p in (input, other))
    return _with_noise(mean, op(left, right))


def _no_bias(arguments: dict[str, Any]) -> str | None:
    if arguments.get("scales"):
        return "it is scaled (alpha, beta)"
    return None if len(arguments["input"].shape) == 1 else "what is added is no bias, a vector"


@rule("local", "addmm", of=("mat2",), along=("input",), refuses=_no_bias, uses=_rows)
def local_addmm(op: Any, input: Any, mat1: Tensor, mat2: Moments, **scales: Any) -> Tensor:
    """`input + mat1 @ mat2`, the variance of a bias added; one noise per output element."""
    mean: Tensor = op(_mean_of(input), mat1, mat2.mu)
    scale = _scale(mat1, mat2.sigma)
    var = mat1.square() @ mat2.var(scale)
    var = var + input.var(scale) if isinstance(input, Moments) else var
    return _with_noise(mean, var.float() * scale**2 if isinstance(scale, Tensor) else var)


@rule("local", F.bilinear, along=("bias",), uses=_rows)
def local_bilinear(op: Any, input1: Tensor, input2: Tensor, weight: Moments, bias: Any = None) -> Tensor:
    """x₁ᵀ w x₂ is linear in w: its variance is that of the squares."""
    mean = op(input1, input2, weight.mu, _mean_of(bias))
    bias_var = bias.var() if isinstance(bias, Moments) else None
    return _with_noise(mean, op(input1.square(), input2.square(), weight.var(), bias_var))


def _renormalized(arguments: dict[str, Any]) -> str | None:
    return "max_norm depends on the drawn rows" if arguments.get("settings", {}).get("max_norm") is not None else None


@rule("local", F.embedding, refuses=_renormalized, uses=_looked_up)
def local_embedding(op: Any, input: Tensor, weight: Moments, **settings: Any) -> Tensor:
    """Noise for the rows looked up alone; a row that is looked up twice gets two noises."""
    mean: Tensor = op(input, weight.mu, **settings)
    sigma: Tensor = op(input, weight.sigma, **settings)
    return mean + (sigma * torch.randn_like(sigma)).to(mean.dtype)


def _scaled(arguments: dict[str, Any]) -> str | None:
    return "it is scaled (alpha)" if arguments.get("scales") else None


@rule("local", "add", of=("input", "other"), refuses=_scaled, uses=_broadcast)
def local_add(op: Any, input: Any, other: Any, **scales: Any) -> Tensor:
    """`x + w` with one noise per output element."""
    x, w = (other, input) if isinstance(input, Moments) else (input, other)
    mean: Tensor = x + w.mu
    return mean + w.sigma.to(mean.dtype) * torch.randn_like(mean)


@rule("local", "mul", of=("input", "other"), uses=_broadcast)
def local_mul(op: Any, input: Any, other: Any) -> Tensor:
    """`x * w` with one noise per output element."""
    x, w = (other, input) if isinstance(input, Moments) else (input, other)
    mean: Tensor = x * w.mu
    noise: Tensor = x * w.sigma.to(mean.dtype) * torch.randn_like(mean)
    return mean + noise


# --- flipout (Wen, Vicol, Ba, Tran & Grosse 2018, arXiv:1803.04386)


@rule("flipout", *LINEAR, *CONVOLUTIONS, *TRANSPOSED, along=("bias",))
def flipout_affine(op: Any, input: Tensor, weight: Moments, bias: Any = None, *settings: Any, **named: Any) -> Tensor:
    """op(x, mu) + s·op(r·x, delta): one delta = sigma·eps a call, with signs r and s of each example's own."""
    channels = -1 if op in LINEAR else 1 - weight.mu.dim()
    outer, inner = (1, 0) if op in TRANSPOSED else (0, 1)
    mean: Tensor = op(input, weight.mu, _mean_of(bias), *settings, **named)
    delta = bias.perturbation() if isinstance(bias, Moments) else None
    flipped = input * weight.flip(input, inner, channels)
    perturbed: Tensor = op(flipped, weight.perturbation(), delta, *settings, **named)
    return mean + perturbed * weight.flip(perturbed, outer, channels)


def _not_a_matrix_on_the_right(arguments: dict[str, Any]) -> str | None:
    shape = getattr(arguments.get("other"), "shape", ())
    return None if len(shape) == 2 else "flipout takes x @ w with a matrix w alone"


@rule("flipout", "matmul", "mm", of=("other",), refuses=_not_a_matrix_on_the_right)
def flipout_matmul(op: Any, input: Any, other: Moments) -> Tensor:
    """`x @ w + s·((r·x) @ delta)`."""
    mean: Tensor = op(input, other.mu)
    perturbed: Tensor = op(input * other.flip(input, 0, -1), other.perturbation())
    return mean + perturbed * other.flip(perturbed, 1, -1)


@rule("flipout", "addmm", of=("mat2",), along=("input",), refuses=_no_bias)
def flipout_addmm(op: Any, input: Any, mat1: Tensor, mat2: Moments, **scales: Any) -> Tensor:
    """`input + mat1 @ mat2`, as `x @ w`; a bias is perturbed with the signs of the outputs."""
    mean: Tensor = op(_mean_of(input), mat1, mat2.mu)
    flipped, delta = mat1 * mat2.flip(mat1, 0, -1), mat2.perturbation()
    perturbed: Tensor = op(input.perturbation(), flipped, delta) if isinstance(input, Moments) else flipped @ delta
    return mean + perturbed * mat2.flip(perturbed, 1, -1)


@rule("flipout", F.bilinear, along=("bias",))
def flipout_bilinear(op: Any, input1: Tensor, input2: Tensor, weight: Moments, bias: Any = None) -> Tensor:
    """Signs of each example's own on both inputs and the output."""
    mean: Tensor = op(input1, input2, weight.mu, _mean_of(bias))
    delta = bias.perturbation() if isinstance(bias, Moments) else None
    flipped = [x * weight.flip(x, axis, -1) for axis, x in ((1, input1), (2, input2))]
    perturbed: Tensor = op(*flipped, weight.perturbation(), delta)
    return mean + perturbed * weight.flip(perturbed, 0, -1)


@rule("flipout", F.embedding, refuses=_renormalized)
def flipout_embedding(op: Any, input: Tensor, weight: Moments, **settings: Any) -> Tensor:
    """Signs of each example's own on the embedding's dimensions: a row looked up twice by it gets one noise."""
    mean: Tensor = op(input, weight.mu, **settings)
    perturbed: Tensor = op(input, weight.perturbation(), **settings)
    perturbed = perturbed * weight.flip(perturbed, 1, -1)
    if weight.is_kept and weight.examples.dim is not None:  # other uses may sum over rows, each with a sign of its own
        perturbed = perturbed * _signs_of_rows(input, weight).unsqueeze(-1)
    return mean + perturbed


def _signs_of_rows(input: Tensor, weight: Moments) -> Tensor:
    """The sign of each row looked up, in the example that does so, in the shape of `input`."""
    number = torch.arange(weight.examples.number, device=input.device).unsqueeze(-1)
    example = weight.examples.spread(number, input.unsqueeze(-1), -1).squeeze(-1)
    signs: Tensor = weight.signs(0)[example, input]
    return signs


@rule("flipout", "add", of=("input", "other"), refuses=_scaled)
def flipout_add(op: Any, input: Any, other: Any, **scales: Any) -> Tensor:
    """`x + w`, w with each example's own signs along its last dimension."""
    x, w = (other, input) if isinstance(input, Moments) else (input, other)
    mean: Tensor = x + w.mu
    return mean + w.perturbation() * _flip_last(w, mean)


@rule("flipout", "mul", of=("input", "other"))
def flipout_mul(op: Any, input: Any, other: Any) -> Tensor:
    """`x * w`, w with each example's own signs along its last dimension."""
    x, w = (other, input) if isinstance(input, Moments) else (input, other)
    mean: Tensor = x * w.mu
    noise: Tensor = x * (w.perturbation() * _flip_last(w, mean))
    return mean + noise


def _flip_last(w: Moments, like: Tensor) -> Tensor | float:
    return w.flip(like, max(0, w.mu.dim() - 1), -1)
