"""The one line: any network to a variational one."""

import warnings
from collections.abc import Mapping

from torch import nn

from varify.errors import VarifyWarning, listed, nonnegative_int
from varify.estimators.rules import EstimatorLike, check_estimator
from varify.inits import InitLike, as_init, started
from varify.module import VariationalModule
from varify.network.checks import check_model
from varify.network.copies import copy_network
from varify.network.parameters import Slot, first_slots, slot_names
from varify.network.selection import WhereLike, by_glob, choose, padding_rows
from varify.posteriors import Settings, Trees, bind
from varify.priors import Gaussian, Prior, PriorLike, as_prior


def variationalize(
    model: nn.Module,
    *,
    prior: PriorLike | Mapping[str, PriorLike] | None = None,
    where: WhereLike = None,
    init: InitLike | Mapping[str, InitLike] = None,
    estimator: EstimatorLike | Mapping[str, EstimatorLike] = "auto",
    strict: bool = False,
    batch_dim: int = 0,
    learn_mu: bool = True,
    learn_rho: bool = True,
) -> VariationalModule:
    """A variational copy of `model`: every chosen parameter w becomes a posterior N(mu, sigma²), mu starting at w.

    `model` itself is not touched. Nothing is refused because torch.fx can't trace it.

    Args:
        model: any `nn.Module`, pretrained or not, on any device.
        prior: for all chosen parameters, or `{glob: prior}` with the default elsewhere and the last match winning:
            a name of `set_prior`, a `varify.priors.Prior` or a factorized `torch.distributions.Distribution`. Default:
            `varify.priors.Gaussian(std=1.0)`.
        where: which parameters: a glob on their names, several, or a predicate `(name, parameter, owner_module) ->
            bool`. Default: every floating-point parameter that requires a gradient, except those of normalization
            layers.
        init: how mu and rho start: a `varify.inits.Init`, the name of one, or `{glob: init}`. Default:
            `varify.inits.OfWeights()`, the weights as means and a tenth of their root mean square by tensor.
        estimator: how gradients are estimated in training, or `{glob: estimator}` with the default elsewhere: "weights"
            draws the weights once a forward; "local" draws the outputs of linear operations; "flipout" gives each
            example perturbations of its own; "auto", the default, takes of these the one with the least variance that
            is exact. Where an estimator is unavailable (several uses, an operation without a rule) the weights are
            drawn, and `summary()` says why. The first training call draws them all, and is recorded.
        strict: raise an EstimatorError in that case, at the first call.
        batch_dim: the dimension of the network's inputs that counts examples, which estimators ask for: 1 for
            sequences of shape `(length, batch, ...)`. Which rows of each operation belong to one example is found out.
        learn_mu: whether the means require gradients (where the parameters did).
        learn_rho: likewise rho.

    Raises:
        ModelError: `model` is no network that can be converted.
        SelectionError: no parameter is chosen.
        PriorError, InitError, EstimatorError: one of these can't be used.
    """
    check_model(model)
    batch_dim = nonnegative_int("batch_dim", batch_dim)
    chosen, skipped = choose(model, where)
    default: Prior = Gaussian(std=1.0)
    chosen_priors = by_glob(default if prior is None else prior, default, chosen, as_prior)
    chosen_inits = by_glob(init, as_init(None), chosen, as_init)
    estimators = by_glob(estimator, "auto", chosen, check_estimator)
    bound = {name: bind(chosen_priors[name], slot) for name, slot in chosen.items()}
    _warn_of_numbers(chosen)
    network = copy_network(model)
    inside, padding = first_slots(network), padding_rows(model, chosen)
    rhos = {}
    for name, slot in chosen.items():
        parameter = inside[name].parameter
        mu, rho = started(chosen_inits[name], slot, bound[name])
        parameter.data.copy_(mu)
        del mu  # before the next: at its peak the conversion takes one copy of the parameters beyond its result
        if name in padding:
            kept = padding[name].to(parameter.device) != 0
            parameter.data[kept] = slot.parameter.detach()[kept]
        rhos[name] = nn.Parameter(rho, requires_grad=slot.parameter.requires_grad and learn_rho)
        parameter.requires_grad_(parameter.requires_grad and learn_mu)
    settings = Settings(list(chosen), slot_names(network), skipped, estimators, strict, batch_dim)
    vnet = VariationalModule(network, Trees.of(rhos, bound), settings)
    for name, mask in padding.items():
        vnet.posteriors.set_mask(name, mask)
    return vnet


def _warn_of_numbers(chosen: Mapping[str, Slot]) -> None:
    """Warn of weights that are no numbers, and no error: a checkpoint may be loaded over them yet."""
    bounds = {name: slot.parameter.detach().aminmax() for name, slot in chosen.items() if slot.parameter.numel()}
    bad = [name for name, (low, high) in bounds.items() if not (low.isfinite() and high.isfinite())]
    if bad:
        warnings.warn(
            f"{listed(bad)} have NaN or infinite weights, and so will all that depends on them: load a checkpoint from "
            "before they came",
            VarifyWarning,
            stacklevel=3,
        )
