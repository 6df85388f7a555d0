"""TFB's rule (Shi et al. 2024, arXiv:2412.05723): the widest posterior whose predictions cost next to nothing."""

import math
import warnings
from collections.abc import Mapping

from varify.analysis.batch import Batch
from varify.analysis.predictive_nll import PredictiveNLL
from varify.analysis.searching import last_within
from varify.errors import ArgumentError, VarifyWarning
from varify.module import VariationalModule
from varify.objective.elbo import Criterion
from varify.weights.posterior import GaussianPosterior

SHARE, NATS = 0.01, 0.005
LEAST = 1e-6


def widest(nll: PredictiveNLL, allowed: float, low: float, high: float, tolerance: float) -> float | None:
    """The log of the greatest t at which the NLL is at most `allowed`; None if none is.

    Args:
        nll: by t.
        allowed: finite.
        low: least log t.
        high: greatest.
        tolerance: of log t.
    """
    return last_within(lambda log_t: nll(math.exp(log_t)), allowed, low, high, tolerance)


def harmless_temperature(
    vnet: VariationalModule, posteriors: Mapping[str, GaussianPosterior], batches: list[Batch], criterion: Criterion
) -> float:
    """The largest t, at most 1, at which these posteriors for `vnet` cost next to nothing on these data.

    That is `SHARE` of the NLL at the means or `NATS` a datum, whichever is more: a share alone is next to nothing where
    a density's NLL happens to be near 0, or a network knows its data by heart. With few draws and a coarse search, for
    it comes before anybody asks.

    Raises:
        ArgumentError: the NLL at the means is not finite.
    """
    nll = PredictiveNLL(vnet, posteriors, lambda: batches, criterion, n_samples=4, linearized=False)
    with nll.kept_noise():
        best = nll(0.0)
        if not math.isfinite(best):
            raise ArgumentError(
                f"the criterion at the means is {best} for the first data, so that fit_sigma can't tell which "
                "temperature does no harm: leave out data without a finite loss, such as those of which all targets "
                "are ignored, or say temperature=1 and then fit_temperature"
            )
        found = widest(nll, best + max(SHARE * abs(best), NATS), math.log(LEAST), 0.0, tolerance=0.1)
    if found is None:
        warnings.warn(
            f"fit_sigma's temperature is at its least, {LEAST}: drawn weights cost {NATS} nats a datum at any other",
            VarifyWarning,
            stacklevel=4,
        )
    return LEAST if found is None else math.exp(found)
