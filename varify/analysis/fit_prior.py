"""The scale of Gaussian priors from the posteriors, in closed form."""

from collections.abc import Sequence

import torch

from varify.errors import PriorError
from varify.module import VariationalModule
from varify.network.selection import matching
from varify.priors import Gaussian
from varify.weights.posterior import GaussianPosterior


@torch.no_grad()
def fit_prior(vnet: VariationalModule, *, where: str | Sequence[str] = "*") -> dict[str, float]:
    """Set the std of Gaussian priors to what maximises the ELBO: empirical Bayes, one number a parameter tensor.

    std² = mean of (mu − m)² + sigma², m the prior's mean. Call it once, or now and then as training goes.

    Args:
        vnet: its parameters with another prior keep that.
        where: glob, or several, on parameter names.

    Returns:
        The new std by parameter name; those of which no weight is free keep theirs, and are left out.

    Raises:
        SelectionError: `where` matches nothing.
        PriorError: nothing that it matches has a Gaussian prior.
    """
    posteriors = dict(vnet.posteriors)
    matched = [name for name in matching(posteriors, where) if isinstance(posteriors[name].prior, Gaussian)]
    if not matched:
        raise PriorError(f"where={where!r} matches no parameter with a Gaussian prior; fit_prior fits the std of those")
    fitted, new = {}, {}
    for name in matched:
        q = posteriors[name].free()
        if not q.rho.numel():  # pruned as a whole: there is nothing to fit to
            continue
        prior = q.prior
        assert isinstance(prior, Gaussian)
        fitted[name] = float(((q.mean - prior.mean).square() + q.sigma.square()).mean().sqrt())
        new[name] = _with_std(name, posteriors[name], fitted[name])
    vnet.posteriors.put_priors(new)
    return fitted


def _with_std(name: str, q: GaussianPosterior, std: float) -> Gaussian:
    """The Gaussian prior of `q` with another std."""
    assert isinstance(q.prior, Gaussian)
    try:
        return Gaussian(q.prior.mean, std).for_parameter(q.mu.detach(), 1)  # the fan_in matters without a std alone
    except PriorError as error:
        raise PriorError(f"{name}: {error}") from None
