"""What a likelihood's noise makes of many outputs: the mixture of the draws' distributions of a target."""

import math
from numbers import Real
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from varify.errors import ArgumentError
from varify.prediction.scores import TensorLike


class Likelihood(Protocol):
    """What a prediction asks of a regression's likelihood; without a `cdf` its noise is taken to be Gaussian."""

    def moments(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of a target given the network's output, each `(*batch, ...)`."""


@runtime_checkable
class OtherNoise(Likelihood, Protocol):
    """Of a likelihood whose noise is not Gaussian.

    Attributes:
        discrete: whether targets are integers.
    """

    discrete: bool

    def log_prob(self, output: Tensor, target: Tensor) -> Tensor:
        """Log density of each target, nats, `(*batch, ...)`, with the output's leading dimensions broadcast."""

    def cdf(self, output: Tensor, target: Tensor) -> Tensor:
        """Probability that a target is at most this, likewise."""


def moments(likelihood: Likelihood, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a target by draw, without the graph of a likelihood whose noise is learned."""
    mean, var = likelihood.moments(samples)
    return mean.detach(), var.detach()


def added(likelihood: Likelihood, samples: Tensor) -> Tensor | None:
    """The noise's variance where a target is the output plus noise that no output changes; None elsewhere.

    Args:
        likelihood: asked for the moments of each draw.
        samples: `(n_samples, *batch, ...)`.
    """
    mean, var = moments(likelihood, samples)
    is_output = mean.shape == samples.shape and torch.equal(mean, samples.to(mean.dtype))
    return var[0] if is_output and torch.equal(var, var[:1].expand_as(var)) else None


def check_level(level: object) -> None:
    """Check the probability of an interval.

    Raises:
        ArgumentError: it is no number within (0, 1).
    """
    if not isinstance(level, (Real, Tensor)) or not 0 < float(level) < 1:
        raise ArgumentError(f"level must lie within (0, 1), got {level!r}")


def check_targets(targets: TensorLike, like: Tensor) -> Tensor:
    """The targets beside `like`, which is of an output.

    Raises:
        ArgumentError: they have another shape.
    """
    targets = torch.as_tensor(targets)
    if targets.shape != like.shape:
        raise ArgumentError(f"the targets have shape {tuple(targets.shape)}, the prediction {tuple(like.shape)}")
    return targets.to(like)


def log_density(likelihood: Likelihood, samples: Tensor, targets: TensorLike) -> Tensor:
    """Log of the mixture's density at the targets of each datum, `(batch,)`, nats; `()` if the targets are one number.

    A datum's targets are independent given the weights, not given the data: they are summed within each draw.
    """
    mean, var = moments(likelihood, samples)
    targets = check_targets(targets, mean[0])
    if isinstance(likelihood, OtherNoise):
        log_p = likelihood.log_prob(samples, targets.expand_as(mean)).detach()
    else:
        log_p = -0.5 * ((targets - mean).square() / var + var.log() + math.log(2 * math.pi))
    return log_mean_exp(log_p if log_p.dim() < 3 else log_p.flatten(2).sum(-1))


def log_mean_exp(log_p: Tensor) -> Tensor:
    """Log of the mean over dimension 0 of what has these logarithms."""
    found: Tensor = log_p.logsumexp(0) - math.log(len(log_p))
    return found


def quantile(likelihood: Likelihood, samples: Tensor, q: float) -> Tensor:
    """Quantile of the mixture, `(*batch, ...)`, by bisection of its distribution function."""
    mean, var = moments(likelihood, samples)
    std = var.sqrt()
    other = likelihood if isinstance(likelihood, OtherNoise) else None
    # every component's own quantile bounds the mixture's
    if other is None:
        ends = mean + std * torch.special.ndtri(torch.tensor(q, dtype=torch.float64)).to(mean)
        low, high = ends.min(0).values, ends.max(0).values
    else:  # and Cantelli's inequality that quantile; less and more by a unit of rounding
        low = (mean - std * math.sqrt((1 - q) / q)).min(0).values
        high = (mean + std * math.sqrt(q / (1 - q))).max(0).values
        low, high = low - 1e-3 * (1 + low.abs()), high + 1e-3 * (1 + high.abs())
    for _ in range(60):
        middle = (low + high) / 2
        if other is None:
            reached = torch.special.ndtr((middle - mean) / std)
        else:
            reached = other.cdf(samples, middle.expand_as(mean)).detach()
        below = reached.mean(0) < q
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    found: Tensor = (low + high) / 2
    return found.round() if other is not None and other.discrete else found
