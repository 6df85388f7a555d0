"""The posterior of one parameter: its mu, rho and prior seen as one thing."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from varify.weights.fused import SharedSigma, is_ordinary, is_plain
from varify.weights.kl import kl_divergence
from varify.weights.moments import Moments
from varify.weights.noise import normal_like
from varify.weights.prior import Prior

PRUNED = 2  # in a mask of fixed weights
# Below it softplus(rho) is e^rho to the last digit of double precision, 1.3e-14: less than any weight's scale.
LEAST_RHO = -32.0


@torch.no_grad()
def softplus_inverse(sigma: Tensor) -> Tensor:
    """Rho with softplus(rho) = sigma, for sigma > 0, elementwise; without gradient."""
    # log(exp(s) - 1) overflows from s = 89 in float32 and loses all digits near 0; sigma + log(-expm1(-sigma)) does
    # neither. In place, for a network may be one large matrix.
    return sigma.neg().expm1_().neg_().log_().add_(sigma)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, in no time where nothing is to be done."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class MaskHas(NamedTuple):
    """Which kinds of weights a tensor may have, beside those that stay at mu.

    Attributes:
        random: weights with noise.
        pruned: weights that are 0.
    """

    random: bool
    pruned: bool


class GaussianPosterior:
    """q(w) = N(mu, sigma²), factorized, with sigma = softplus(rho).

    A view: `mu` and `rho` are the live parameters, so what is computed here is differentiable in them.

    Attributes:
        mu: `(*shape)`, in the network's dtype.
        rho: `(*shape)`, in single precision where the network is half.
        prior: what the Kullback-Leibler divergence is taken to.
        fixed: `(*shape)`, nonzero at weights that are not random: 1 where they stay at mu (the padding row of an
            embedding), `PRUNED` where they are 0. They have sigma 0 and no divergence. None if there
            are none. Those that stay at mu have the gradient that the network gives them.
        shared: None, or while draws and divergences share one softplus(rho), that and the version of rho; empty before.
    """

    __slots__ = ("_mask_of", "fixed", "mu", "prior", "rho", "shared")

    def __init__(self, mu: Tensor, rho: Tensor, prior: Prior, fixed: Tensor | None = None) -> None:
        self.mu, self.rho, self.prior, self.fixed = mu, rho, prior, fixed
        self.shared: list[tuple[Tensor, int]] | None = None
        self._mask_of: tuple[Tensor, int, MaskHas] | None = None

    @property
    def mean(self) -> Tensor:
        """mu, `(*shape)`, in the precision of rho, which draws and divergences are computed in."""
        mean = cast(self.mu, self.rho.dtype)
        if self.fixed is None:
            return mean
        return torch.where(self.fixed == PRUNED, 0.0, mean)

    @property
    def sigma(self) -> Tensor:
        """Standard deviation, `(*shape)`, in the precision of rho."""
        sigma = self._softplus()
        return sigma if self.fixed is None else torch.where(self.fixed == 0, sigma, 0.0)

    def _softplus(self) -> Tensor:
        if self.shared is None or not (is_plain() and is_ordinary(self.rho)):
            return F.softplus(self.rho)
        sigma: Tensor = SharedSigma.apply(self.rho, self.known_sigma())  # type: ignore[no-untyped-call]
        return sigma

    def known_sigma(self) -> Tensor:
        """Softplus of rho, `(*shape)`, without mask and gradient; made once while it is `shared` and rho unchanged."""
        shared = self.shared  # another thread may end the sharing meanwhile
        if shared is None or self.rho.is_inference():
            return F.softplus(self.rho.detach())
        version = self.rho._version  # before the numbers, which another thread may change
        if not shared or shared[0][1] != version:
            with torch.inference_mode(False):  # a thread that trains may take them from one that predicts
                shared[:] = [(F.softplus(self.rho.detach()), version)]
        return shared[0][0]

    @property
    def mask_has(self) -> MaskHas:
        """Which kinds of weights there are; looked up once for each version of the mask, which `.data` has none of."""
        fixed = self.fixed
        if fixed is None:
            return MaskHas(random=True, pruned=False)
        if fixed.is_meta or not (is_plain() and is_ordinary(fixed)):
            return MaskHas(random=True, pruned=True)  # nobody can tell
        version, known = -1 if fixed.is_inference() else fixed._version, self._mask_of
        if known is None or known[0] is not fixed or known[1] != version or version < 0:
            kinds = MaskHas(random=bool((fixed == 0).any()), pruned=bool((fixed == PRUNED).any()))
            known = self._mask_of = fixed, version, kinds
        return known[2]

    @property
    def log_sigma(self) -> Tensor:
        """Log of the standard deviation of weights that are not fixed, `(*shape)`; exact where sigma underflows."""
        sigma, log_rest = self.floored_sigma()
        return sigma.log() + log_rest

    def floored_sigma(self) -> tuple[Tensor, Tensor]:
        """Sigma, but at least 1.3e-14, and log sigma less the logarithm of that, each `(*shape)`; masks don't count.

        A divergence takes the first for sigma, which underflows where rho is far below 0, and then subtracts the sum
        of the second: of so small a sigma only the logarithm makes a difference, to any prior for weights.
        """
        # Without a gradient of its own, so that rho has that of the logarithm at the floor: 1, as anywhere below it.
        rest = self.rho.detach().sub(LEAST_RHO).clamp_max_(0.0)
        return F.softplus(self.rho - rest), rest

    @property
    def snr(self) -> Tensor:
        """Signal to noise, |mu|/sigma, `(*shape)`: how much a weight matters; 0 for one that is fixed at 0."""
        return torch.where(self.mean == 0, 0.0, self.mean.abs() / self.sigma)

    def noise(self) -> Tensor:
        """Eps ~ N(0, 1), `(*shape)`. Always a new tensor: one refilled in place would corrupt rho's gradients."""
        return normal_like(self.rho)

    def at(self, eps: Tensor) -> Tensor:
        """Mu + sigma·eps, `(*shape)`, in the precision of rho (Kingma & Welling 2014, arXiv:1312.6114)."""
        return torch.addcmul(self.mean, self.sigma, eps)

    def rsample(self) -> Tensor:
        """One draw, `(*shape)`, in the network's dtype, differentiable in mu and rho."""
        return cast(self.at(self.noise()), self.mu.dtype)

    def moments(self, *, keeping: int | None = None) -> Moments:
        """Mean, in the network's dtype, and sigma, each `(*shape)`, for an estimator.

        Args:
            keeping: keep one noise for all uses in a call of so many examples; see `SharedNoise`.
        """
        moments = Moments(cast(self.mean, self.mu.dtype), self.sigma)
        return moments if keeping is None else moments.keeping(keeping)

    def entropy(self) -> Tensor:
        """Σ log sigma + n/2·(1 + log 2π), scalar `()`, nats."""
        if self.fixed is not None:
            return self.unmasked().entropy()
        return self.log_sigma.sum() + self.rho.numel() * 0.5 * (1 + math.log(2 * math.pi))

    def log_ratio(self, eps: Tensor) -> Tensor:
        """Log q(w) − log p(w) at the draw that belongs to `eps`, scalar `()`, nats; its mean over draws is the KL."""
        if self.fixed is not None:
            return self.unmasked().log_ratio(eps[self.fixed == 0])
        if not self.rho.numel():  # a prior's density of no weights, such as one by their mean, may be NaN
            return self.rho.sum()
        log_q = -(0.5 * eps.square() + self.log_sigma).sum() - 0.5 * eps.numel() * math.log(2 * math.pi)
        return log_q - self.prior.log_density(self.at(eps))

    def kl_divergence(self) -> Tensor:
        """KL(q‖prior), scalar `()`, nats: exact where there is a rule, else an unbiased estimate."""
        q = self.unmasked()
        return kl_divergence(q, q.prior) if q.rho.numel() else q.rho.sum()

    def unmasked(self) -> "GaussianPosterior":
        """The posterior of the weights that are not fixed, as a vector."""
        if self.fixed is None:
            return self
        free = self.fixed == 0
        return GaussianPosterior(self.mu[free], self.rho[free], self.prior.at(free))

    @torch.no_grad()
    def tempered(self, t: float) -> "GaussianPosterior":
        """The posterior with t > 0 times the variance; weights that are fixed keep their rho. Without gradient."""
        sigma, log_rest = self.floored_sigma()  # where sigma underflows, rho is its logarithm
        rho = softplus_inverse(sigma * math.sqrt(t)) + log_rest
        rho = rho if self.fixed is None else torch.where(self.fixed == 0, rho, self.rho)
        return GaussianPosterior(self.mu, rho, self.prior, self.fixed)

    def __repr__(self) -> str:
        return f"GaussianPosterior(shape={tuple(self.mu.shape)}, prior={self.prior!r})"
