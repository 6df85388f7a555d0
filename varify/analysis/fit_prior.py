"""Fit the std of Gaussian priors to the posteriors, in closed form."""

import math
from collections.abc import Sequence

import torch

from varify.errors import PriorError
from varify.module import VariationalModule
from varify.network.selection import matching
from varify.priors import Gaussian
from varify.priors.gaussian import is_gaussian
from varify.weights.posterior import GaussianPosterior
from varify.within import check_variational


@torch.no_grad()
def fit_prior(vnet: VariationalModule, *, where: str | Sequence[str] = "*") -> dict[str, float]:
    """Set the std of Gaussian priors to maximize the ELBO: empirical Bayes, one number per parameter tensor.

    std² = mean of (mu − m)² + sigma², with m the prior's mean. Call it once, or now and then during training.

    Args:
        vnet: changed in place. Parameters with another prior keep that.
        where: glob, or several, on parameter names.

    Returns:
        The new std by parameter name, without parameters of which no weight is free: they keep their prior.

    Raises:
        SelectionError: `where` matches nothing.
        PriorError: no matching parameter has a Gaussian prior.
    """
    check_variational(vnet, "varify.fit_prior")
    posteriors = dict(vnet.posteriors)
    matched = [name for name in matching(posteriors, where) if is_gaussian(posteriors[name].prior)]
    if not matched:
        raise PriorError(f"where={where!r} matches no parameter with a Gaussian prior; fit_prior fits the std of those")
    fitted, new, learned = {}, {}, {}
    for name in matched:
        q = posteriors[name].unmasked()
        if not q.rho.numel():  # no weight is free: there is nothing to fit to
            continue
        prior = q.prior
        assert isinstance(prior, Gaussian)
        fitted[name] = float(((q.mean - prior.mean).square() + q.sigma.square()).mean().sqrt())
        new[name] = _with_std(name, posteriors[name], fitted[name])
        if prior.learn_std:  # the parameter that an optimizer knows
            learned[name] = prior.log_std
    for name, log_std in learned.items():
        log_std.fill_(math.log(fitted[name]))
        new[name].adopt(posteriors[name].prior)
    vnet.posteriors.put_priors(new)
    return fitted


def _with_std(name: str, q: GaussianPosterior, std: float) -> Gaussian:
    """The Gaussian prior of `q` with another std."""
    assert isinstance(q.prior, Gaussian)
    try:
        # of the same class; the fan-in is used only if there is no std
        return q.prior._with(q.prior.mean, std).for_parameter(q.mu.detach(), 1)
    except PriorError as error:
        raise PriorError(f"{name}: {error}") from None
