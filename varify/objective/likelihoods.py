"""Likelihoods of regression: criteria with a noise level that is learned, and the noise they put into a prediction.

Others than Gaussians are in `varify.objective.other_likelihoods`.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varify.errors import ArgumentError, positive_number
from varify.weights.posterior import softplus_inverse


class Likelihood(nn.Module, ABC):
    """p(y | output): a criterion, and what `Prediction` asks of the noise."""

    @abstractmethod
    def log_prob(self, output: Tensor, target: Tensor) -> Tensor:
        """Log density of each target, or log probability, nats, in the targets' shape `(*batch, targets)`.

        Raises:
            ArgumentError: a target has a value that can't be.
        """

    @abstractmethod
    def moments(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of y given the network's output, each `(*batch, targets)`."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Negative log likelihood per datum, nats, `()`: summed over a datum's targets, averaged over dimension 0.

        Raises:
            ArgumentError: the shapes differ (broadcasting here would compare every output with every target), or a
                target has a value that can't be.
        """
        shape = self.shape(output)
        if shape != target.shape:
            raise ArgumentError(f"the mean has shape {tuple(shape)}, the target {tuple(target.shape)}")
        nll = -self.log_prob(precise(output), target)
        return nll.sum() / len(target) if target.dim() else nll

    def shape(self, output: Tensor) -> torch.Size:
        """Of the targets that belong to this output."""
        return output.shape


def precise(output: Tensor) -> Tensor:
    """In at least single precision: in half a variance underflows, and its digits are too few for a gradient."""
    return output.to(torch.promote_types(output.dtype, torch.float32))


class GaussianLikelihood(Likelihood):
    """y ~ N(output, sigma²) with one noise level for all data: a criterion whose parameter is trained along.

    Args:
        sigma: standard deviation of the noise at the start, in units of y, > 0.
        learn: whether `rho`, sigma = softplus(rho), requires a gradient.
    """

    def __init__(self, sigma: float = 1.0, learn: bool = True) -> None:
        super().__init__()
        self.rho = nn.Parameter(softplus_inverse(torch.tensor(positive_number("sigma", sigma))), requires_grad=learn)

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of the noise, `()`."""
        return F.softplus(self.rho)

    def moments(self, output: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        output = precise(output)
        return output, self.sigma.to(output.dtype).square().expand_as(output)

    def log_prob(self, output: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        mean, var = self.moments(output)
        return -0.5 * ((target - mean).square() / var + var.log() + math.log(2 * math.pi))


class HeteroscedasticGaussianLikelihood(GaussianLikelihood):
    """y ~ N(mean, sigma²) with a noise level of each datum's own, from a head with two outputs for every target.

    The last dimension of the output holds the means, then as many rho's, sigma = floor + softplus(rho).

    Args:
        floor: least standard deviation, > 0: without one, the likelihood of a point fitted exactly has no bound.
    """

    def __init__(self, floor: float = 1e-3) -> None:
        super().__init__(learn=False)
        del self.rho
        self.floor = positive_number("floor", floor)

    @property
    def sigma(self) -> Tensor:
        """None: each target has its own.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError("each target has a sigma of its own here: moments(output)[1].sqrt() are those of an output")

    def shape(self, output: Tensor) -> torch.Size:  # noqa: D102
        return self.moments(output)[0].shape

    def moments(self, output: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        if output.shape[-1] % 2:
            raise ArgumentError(
                f"the head has {output.shape[-1]} outputs; a mean and a rho for each target make it even"
            )
        mean, rho = precise(output).chunk(2, -1)
        return mean, (self.floor + F.softplus(rho)).square()
