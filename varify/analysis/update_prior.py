"""The posterior as the next prior: data that come in parts."""

from collections.abc import Sequence

import torch

from varify.module import VariationalModule
from varify.network.selection import matching
from varify.network.sharding import refuse_sharded
from varify.priors import Gaussian
from varify.within import check_variational


@torch.no_grad()
def update_prior(vnet: VariationalModule, *, where: str | Sequence[str] = "*") -> None:
    """Make N(mu, sigma²) of every weight, as they are now, its prior: what was learned so far is what is known before.

    Variational continual learning (Nguyen et al. 2018, arXiv:1710.10628, eq. 1): train on one part of the data, call
    this, train on the next, with `num_data` the size of that part and, since a prior from data is worth as much as
    data, the whole KL, `beta=1`. The divergence is 0 just afterwards, and mu and rho stay.

    Args:
        vnet: changed in place; the priors, two tensors for each parameter, are saved with it. Weights with a mask have
            no divergence, before and after.
        where: glob, or several, on parameter names; leave out a head of which each part of the data has its own.

    Raises:
        ModelError: vnet is no variational module.
        SelectionError: `where` matches nothing.
        StructureError: the parameters are in parts (FSDP2).
    """
    check_variational(vnet, "varify.update_prior")
    refuse_sharded(vnet, "varify.update_prior")
    posteriors = dict(vnet.posteriors)
    new = {}
    for name in matching(posteriors, where):
        q = posteriors[name]
        # not q.sigma: that of a weight with a mask is 0, which no prior may have
        new[name] = Gaussian(q.mean.detach(), q.floored_sigma()[0])
    vnet.posteriors.put_priors(new)
