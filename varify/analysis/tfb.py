"""TFB's rule (Shi et al. 2024, arXiv:2412.05723): the widest posterior whose predictions cost next to nothing."""

import math
from collections.abc import Iterable, Mapping

from varify.analysis.batch import Batch
from varify.analysis.predictive_nll import PredictiveNLL
from varify.analysis.searching import last_within
from varify.module import VariationalModule
from varify.objective.elbo import Criterion
from varify.weights.posterior import GaussianPosterior


def widest(nll: PredictiveNLL, share: float, low: float, high: float, tolerance: float) -> tuple[float, float | None]:
    """The NLL at the means, and the log of the greatest t at which it is at most that `share` above; None if none is.

    Args:
        nll: by t.
        share: of the NLL at the means, in size.
        low: least log t.
        high: greatest.
        tolerance: of log t.
    """
    best = nll(0.0)
    return best, last_within(lambda log_t: nll(math.exp(log_t)), best + share * abs(best), low, high, tolerance)


def harmless_temperature(
    vnet: VariationalModule, posteriors: Mapping[str, GaussianPosterior], batches: Iterable[Batch], criterion: Criterion
) -> float:
    """The largest t, at most 1, that TFB's rule allows these posteriors for `vnet` on these data; the least if none.

    With few draws and a coarse search, for it comes before anybody asks.
    """
    nll = PredictiveNLL(vnet, posteriors, lambda: batches, criterion, n_samples=4, linearized=False)
    with nll.kept_noise():
        _, found = widest(nll, 0.01, math.log(1e-6), 0.0, tolerance=0.1)
    return 1e-6 if found is None else math.exp(found)
