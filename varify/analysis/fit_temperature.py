"""One number that multiplies all variances, from data that the network was not trained on."""

import math
import warnings
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch

from varify.analysis import data_of_sigmas
from varify.analysis.predictive_nll import PredictiveNLL
from varify.analysis.searching import minimum
from varify.analysis.splitting import Batches
from varify.analysis.tfb import widest
from varify.errors import ArgumentError, ModelError, VarifyWarning, one_of, positive_int, positive_number
from varify.module import VariationalModule
from varify.network.sharding import refuse_sharded
from varify.objective.elbo import Criterion
from varify.within import refuse_nested

RULES = ("nll", "tfb")
# Of log t: a percent of the variances, far below what so many draws can tell.
TOLERANCE = 0.01


@torch.no_grad()
def fit_temperature(
    vnet: VariationalModule,
    loader: Iterable[Any],
    criterion: Criterion,
    *,
    n_samples: int = 16,
    rule: str = "nll",
    tolerance: float = 0.01,
    bounds: tuple[float, float] = (1e-6, 1e6),
    batched: object = None,
    linearized: bool = False,
) -> float:
    r"""Multiply all variances by one number t, the temperature, that is found on held-out data.

    Both rules look at the negative log likelihood of the predictive, $-\log \frac1S \sum_s p(y|x, w_s)$, mean over
    the data, in eval mode, with the same S draws of the noise at all temperatures, so that it is a smooth function of
    t. "nll" takes the t at which it is least. "tfb" takes the largest t at which it is at most a share `tolerance`
    above that of the means (Shi et al. 2024, arXiv:2412.05723, there for one sigma of low-rank adapters): as much
    spread as costs next to nothing.

    Args:
        vnet: its rho's are changed, once, at the end; weights with a mask stay.
        loader: of (inputs, targets), inputs as for `ELBO`, the same data at each pass: about 25 passes are made. An
            iterator is kept in memory. Data that the network was not trained on: on those that it was, the means are
            best and a share of their NLL is next to nothing. Only the data set that `fit_sigma` had is known again.
        criterion: `(output, targets)` to the negative log likelihood of a datum, mean over the batch, nats. It is
            called with one datum at a time. Where a datum has several labels, it must sum over these.
        n_samples: draws of the weights, S.
        rule: "nll" or "tfb".
        tolerance: for "tfb", a share of the NLL at the means.
        bounds: least and greatest t.
        batched: as for `fit_sigma`.
        linearized: the predictive is that of `predict(..., linearized=True)`.

    Returns:
        t. Torch's generator is as after one random number.

    Raises:
        ModelError: vnet is no variational module.
        ArgumentError: an empty loader, n_samples < 1, an unknown rule, a negative tolerance, bounds that are none, a
            criterion without a scalar or finite at no temperature, a variational module within, or tensors of which it
            is unknown whether they have an entry for each datum.
        StructureError: the parameters are in parts (FSDP2).

    Warns:
        VarifyWarning: t is at one of the bounds, or the loader or its data set is the one that `fit_sigma` had.
    """
    low, high = _checked(vnet, n_samples, rule, tolerance, bounds)
    if data_of_sigmas.were(vnet, loader):
        warnings.warn(
            "these are the data that fit_sigma had: the temperature wants data that the network was not trained on",
            VarifyWarning,
            stacklevel=3,
        )

    def batches() -> Batches:
        return Batches(vnet, list(loader) if iter(loader) is loader else loader, criterion, batched)

    nll = PredictiveNLL(vnet, vnet.posteriors, batches, criterion, n_samples, linearized)
    with nll.kept_noise():
        if rule == "nll":
            found = minimum(lambda log_t: nll(math.exp(log_t)), low, high, TOLERANCE)
            best = nll(math.exp(found))
        else:
            best = nll(0.0)
            within = widest(nll, best + tolerance * abs(best), low, high, TOLERANCE) if math.isfinite(best) else None
            found = low if within is None else within
    if not math.isfinite(best):
        raise ArgumentError(f"the criterion must be finite at some temperature, got {best}")
    t = math.exp(found)
    new = {name: q.tempered(t).rho for name, q in vnet.posteriors.items()}
    if found in (low, high):
        warnings.warn(_told(found == low, rule, t), VarifyWarning, stacklevel=3)  # the caller, beyond no_grad's wrapper
    for name, q in vnet.posteriors.items():
        q.rho.copy_(new[name])
    return t


def _checked(vnet: object, n_samples: object, rule: object, tolerance: object, bounds: object) -> tuple[float, float]:
    """The logarithms of the bounds, if all arguments can be."""
    if not isinstance(vnet, VariationalModule):
        raise ModelError(f"vnet must be what varify.variationalize returns, got {type(vnet).__name__}")
    positive_int("n_samples", n_samples)
    one_of("rule", rule, RULES)
    if not isinstance(tolerance, Real) or not 0 <= float(tolerance) < math.inf:
        raise ArgumentError(f"tolerance must be a number of at least 0, got {tolerance!r}")
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ArgumentError(f"bounds must be two numbers, (least, greatest), got {bounds!r}")
    low, high = (positive_number("bounds", bound) for bound in bounds)
    if not low < high:
        raise ArgumentError(f"bounds must be (least, greatest), got {bounds!r}")
    refuse_sharded(vnet, "varify.fit_temperature")
    refuse_nested(vnet, "varify.fit_temperature")
    return math.log(low), math.log(high)


def _told(at_low: bool, rule: str, t: float) -> str:
    if at_low:
        why = "the means alone predict best" if rule == "nll" else "the NLL rises by more than the tolerance anywhere"
    else:
        why = "a wider posterior may do better" if rule == "nll" else "the NLL rises by more than the tolerance nowhere"
    return f"the temperature is at its bound, {t:.3g}: within these {why}"
