"""Which priors are Gaussian, and so have a curvature that doesn't depend on the weight."""

from typing import NamedTuple

from torch import Tensor, distributions

from varify.errors import PriorError
from varify.priors.distribution import Factorized
from varify.priors.gaussian import is_gaussian
from varify.weights.prior import Prior


class Moments(NamedTuple):
    """Of a Gaussian prior; numbers, or tensors that broadcast to the parameter's `(*shape)`."""

    mean: Tensor | float
    std: Tensor | float


def moments(prior: Prior) -> Moments:
    """Mean and standard deviation of a Gaussian prior.

    Raises:
        PriorError: it is another one.
    """
    if is_gaussian(prior) and prior.std is not None:
        return Moments(prior.mean, prior.std)
    if isinstance(prior, Factorized):
        p = prior.distribution
        if type(p) is distributions.Normal:
            return Moments(p.loc, p.scale)
    raise PriorError(
        f"{prior!r} is no Gaussian, and IVON takes the prior's curvature from its std: use "
        "varify.priors.Gaussian (centered or not) or torch.distributions.Normal, or train with torch.optim.Adam"
    )
