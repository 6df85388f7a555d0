"""Conjugate priors: the weights of a tensor share a variance, or mean and variance, that are integrated out."""

import math
from typing import Any

import torch
from torch import Tensor

from varify.errors import PriorError
from varify.priors.gaussian import LOG_2PI
from varify.priors.registry import register
from varify.weights.prior import Prior


@register("conjugate_known_mean")
class ConjugateKnownMean(Prior):
    """N(mean, var) on every weight of a tensor, var ~ InverseGamma(alpha_0, beta_0), integrated out.

    The weights of one tensor share the variance, so the prior learns the tensor's scale (Murphy 2007, Conjugate
    Bayesian analysis of the Gaussian distribution). The defaults are those of PyVarInf's experiment.

    Args:
        mean: the known mean.
        alpha_0: shape of the inverse gamma, > 0.
        beta_0: its scale, > 0.
        n_mc_samples: draws in the estimate of the KL.
    """

    mean: Tensor | float
    alpha_0: float
    beta_0: float

    def __init__(self, mean: object = 0.0, alpha_0: float = 0.5, beta_0: float = 0.5, n_mc_samples: int = 1) -> None:
        super().__init__(n_mc_samples)
        self.keep(mean=mean)
        self.keep_positive(alpha_0=_scalar("alpha_0", alpha_0), beta_0=_scalar("beta_0", beta_0))

    def log_prob(self, w: Tensor) -> Tensor:  # noqa: D102
        sum_of_squares = (w - self.mean).square().sum()
        return _inverse_gamma_marginal(self.alpha_0, self.beta_0, w.numel(), 0.5 * sum_of_squares)


@register("conjugate")
class Conjugate(Prior):
    """N(m, var) on every weight of a tensor, m | var ~ N(mu_0, var/kappa_0), var ~ InverseGamma(alpha_0, beta_0).

    Mean and variance are shared within a tensor and integrated out (Murphy 2007, section 3 ff.). The defaults are
    those of PyVarInf's experiment.

    Args:
        mu_0: prior mean of m.
        kappa_0: how many weights it counts for, > 0.
        alpha_0: shape of the inverse gamma, > 0.
        beta_0: its scale, > 0.
        n_mc_samples: draws in the estimate of the KL.
    """

    mu_0: float
    kappa_0: float
    alpha_0: float
    beta_0: float

    def __init__(
        self,
        mu_0: float = 0.0,
        kappa_0: float = 3.0,
        alpha_0: float = 0.5,
        beta_0: float = 0.5,
        n_mc_samples: int = 1,
    ) -> None:
        super().__init__(n_mc_samples)
        self.keep(mu_0=_scalar("mu_0", mu_0))
        self.keep_positive(
            kappa_0=_scalar("kappa_0", kappa_0), alpha_0=_scalar("alpha_0", alpha_0), beta_0=_scalar("beta_0", beta_0)
        )

    def log_prob(self, w: Tensor) -> Tensor:  # noqa: D102
        n, mean = w.numel(), w.mean()
        kappa_n = self.kappa_0 + n
        spread = 0.5 * (w - mean).square().sum() + self.kappa_0 * n * (mean - self.mu_0).square() / (2 * kappa_n)
        marginal = _inverse_gamma_marginal(self.alpha_0, self.beta_0, n, spread)
        return marginal + 0.5 * math.log(self.kappa_0 / kappa_n)


def _scalar(name: str, value: object) -> Any:
    if isinstance(value, Tensor) and value.dim():
        raise PriorError(f"{name} has shape {tuple(value.shape)}: one number is shared by a whole parameter tensor")
    return value


def _inverse_gamma_marginal(alpha_0: float, beta_0: float, n: int, spread: Tensor) -> Tensor:
    """Log density of n weights with the variance integrated out; `spread` is what they add to beta_0."""
    # in tensors, for torch.compile can't follow math.lgamma of a size that varies; in double precision on the CPU
    alpha = torch.tensor([alpha_0, alpha_0 + n / 2], dtype=torch.float64)
    before, after = torch.lgamma(alpha)
    constant = after - before + alpha_0 * math.log(beta_0) - n / 2 * LOG_2PI
    marginal: Tensor = constant - alpha[1] * (beta_0 + spread).log()
    return marginal.to(spread.dtype)
