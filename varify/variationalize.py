"""The one line: any network to a variational one."""

from typing import Any

import torch
from torch import Tensor, nn

from varify import inits, priors
from varify.copies import copy_network
from varify.module import VariationalModule, bind
from varify.priors import Prior
from varify.selection import Site, Where, by_glob, check_model, choose, sites
from varify.trees import HALF


def variationalize(
    model: nn.Module,
    *,
    prior: Any = "gaussian",
    where: Where = None,
    init: Any = None,
    learn_mu: bool = True,
    learn_rho: bool = True,
) -> VariationalModule:
    """A variational copy of `model`: every chosen parameter w becomes a posterior N(mu, sigma²), mu starting at w.

    `model` itself is not touched. Nothing is refused because torch.fx can't trace it.

    Args:
        model: any `nn.Module`, pretrained or not, on any device.
        prior: for all chosen parameters, or `{glob: prior}` with the default elsewhere and the last match winning:
            a name of `set_prior`, a `varify.priors.Prior` or a factorised `torch.distributions.Distribution`.
        where: which parameters: a glob on their names, several, or a predicate `(name, parameter, owner_module) ->
            bool`. Default: every floating-point parameter that requires a gradient, except those of normalisation
            layers.
        init: how mu and rho start: a `varify.inits.Init`, the name of one, or `{glob: init}`. Default:
            `varify.inits.Relative()`, the weights as means and a tenth of the prior's standard deviation.
        learn_mu: whether the means require gradients (where the parameters did).
        learn_rho: likewise rho.

    Raises:
        ModelError: `model` is no network that can be converted.
        SelectionError: no parameter is chosen.
        PriorError, InitError: the prior or the initialisation can't be used.
    """
    check_model(model)
    chosen, skipped = choose(model, where)
    chosen_priors = by_glob(prior, priors.make("gaussian"), chosen, priors.make)
    chosen_inits = by_glob(init, inits.make(None), chosen, inits.make)
    bound = {name: bind(chosen_priors[name], site) for name, site in chosen.items()}
    network = copy_network(model)
    inside = sites(network)
    rhos = {}
    for name, site in chosen.items():
        mu, rho = _start(chosen_inits[name], site, bound[name])
        parameter = inside[name].parameter
        parameter.data.copy_(mu)
        rhos[name] = nn.Parameter(rho, requires_grad=site.parameter.requires_grad and learn_rho)
        parameter.requires_grad_(parameter.requires_grad and learn_mu)
    return VariationalModule(network, rhos, bound, skipped)


@torch.no_grad()
def _start(init: inits.Init, site: Site, prior: Prior) -> tuple[Tensor, Tensor]:
    w = site.parameter.detach()
    w = w.float() if w.dtype in HALF else w
    std = prior.weight_std()
    if std is None:
        std = priors.Gaussian().for_parameter(w, site.fan_in).weight_std()
    mu, rho = init(w, torch.as_tensor(std, dtype=w.dtype, device=w.device).expand_as(w).clone())
    return mu, rho.contiguous().clone()
