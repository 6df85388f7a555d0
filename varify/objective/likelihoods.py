"""Likelihoods of regression: criteria with a noise level that is learned, and the noise they put into a prediction."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varify.errors import ArgumentError, positive_number
from varify.weights.posterior import softplus_inverse


class GaussianLikelihood(nn.Module):
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

    def moments(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of y given the network's output, each `(*batch, targets)`."""
        return output, self.sigma.square().to(output.dtype).expand_as(output)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Negative log likelihood per datum, nats, `()`: summed over a datum's targets, averaged over dimension 0.

        Raises:
            ArgumentError: the shapes differ (broadcasting here would compare every output with every target).
        """
        mean, var = self.moments(output)
        if mean.shape != target.shape:
            raise ArgumentError(f"the mean has shape {tuple(mean.shape)}, the target {tuple(target.shape)}")
        nll = 0.5 * ((target - mean).square() / var + var.log() + math.log(2 * math.pi))
        return nll.sum() / len(target) if target.dim() else nll


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

    def moments(self, output: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        if output.shape[-1] % 2:
            raise ArgumentError(
                f"the head has {output.shape[-1]} outputs; a mean and a rho for each target make it even"
            )
        mean, rho = output.chunk(2, -1)
        return mean, (self.floor + F.softplus(rho)).square()
