"""The scale mixture of two Gaussians."""

import torch
from torch import Tensor

from varify.errors import PriorError
from varify.priors.gaussian import normal_log_density
from varify.priors.registry import register
from varify.weights.prior import Prior


@register("mixtgauss")
class ScaleMixture(Prior):
    """pi·N(0, sigma_1²) + (1 − pi)·N(0, sigma_2²) on every weight (Blundell et al. 2015, arXiv:1505.05424, eq. 7).

    The defaults are those of PyVarInf's experiment. Blundell et al. chose among sigma_1 = 1, e⁻¹, e⁻², sigma_2 = e⁻⁶,
    e⁻⁷, e⁻⁸ and pi = ¼, ½, ¾ (section 5.1).

    Args:
        sigma_1: standard deviation of the first Gaussian, > 0.
        sigma_2: of the second.
        pi: probability of the first, within (0, 1).
        n_mc_samples: draws in the estimate of the KL.
    """

    sigma_1: Tensor | float
    sigma_2: Tensor | float
    pi: Tensor | float

    def __init__(self, sigma_1: object = 0.2, sigma_2: object = 0.02, pi: object = 0.5, n_mc_samples: int = 1) -> None:
        super().__init__(n_mc_samples)
        self.keep_positive(sigma_1=sigma_1, sigma_2=sigma_2)
        self.keep(pi=pi)
        inside = torch.as_tensor(self.pi)
        if not ((inside > 0) & (inside < 1)).all():
            raise PriorError(f"pi must lie within (0, 1), got {pi!r}")

    def log_prob(self, w: Tensor) -> Tensor:  # noqa: D102
        pi = torch.as_tensor(self.pi, dtype=w.dtype, device=w.device)
        # logaddexp: a floor under the density instead would take the gradient from every large weight
        first = pi.log() + normal_log_density(w / self.sigma_1, self.sigma_1)
        second = torch.log1p(-pi) + normal_log_density(w / self.sigma_2, self.sigma_2)
        return torch.logaddexp(first, second).sum()

    def stddev(self) -> Tensor | float:  # noqa: D102
        var: Tensor | float = self.pi * self.sigma_1**2 + (1 - self.pi) * self.sigma_2**2
        return var**0.5
