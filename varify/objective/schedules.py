"""Weights of the KL that change from step to step, for `ELBO(beta=...)`.

A schedule is any function of the step, counted from 0, to a number. The loss is nll + beta·kl/num_data, so beta = 1
at every step is the evidence lower bound; a weighting of the minibatches that adds up to 1 over an epoch (Blundell's)
has a mean of 1 here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from varify.errors import ArgumentError, positive_int

__all__ = ["Schedule", "blundell", "cyclical", "uniform", "warm_up"]

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class _Named:
    """A schedule that prints as the call that made it."""

    call: str
    beta: Schedule

    def __call__(self, step: int) -> float:
        return self.beta(step)

    def __repr__(self) -> str:
        return self.call


def uniform(num_batches: int) -> Schedule:
    """Each of an epoch's batches carries 1/M of the KL, which is beta = 1 (Graves 2011)."""
    positive_int("num_batches", num_batches)
    return _Named(f"uniform({num_batches})", lambda step: 1.0)


def blundell(num_batches: int) -> Schedule:
    """The i-th of M batches carries 2^(M−i)/(2^M − 1) of the KL (Blundell et al. 2015, arXiv:1505.05424, section 3.4).

    beta is M times that; over an epoch its mean is 1.
    """
    positive_int("num_batches", num_batches)

    def beta(step: int) -> float:
        i = step % num_batches + 1
        # 2^(M − i)/(2^M − 1), without numbers that overflow
        return num_batches * 2.0**-i / -math.expm1(-num_batches * math.log(2))

    return _Named(f"blundell({num_batches})", beta)


def warm_up(steps: int, end: float = 1.0) -> Schedule:
    """From 0 to `end` on a line, then constant (Sønderby et al. 2016, arXiv:1602.02282)."""
    positive_int("steps", steps)
    return _Named(f"warm_up({steps}, end={end})", lambda step: end * min(step / steps, 1.0))


def cyclical(period: int, rising: float = 0.5, end: float = 1.0) -> Schedule:
    """Warm-ups again and again: up for a share `rising` of each period, then level (Fu et al. 2019, arXiv:1903.10145).

    Args:
        period: steps of a cycle.
        rising: share of it, within (0, 1].
        end: the value that is reached.
    """
    positive_int("period", period)
    if not 0 < rising <= 1:
        raise ArgumentError(f"rising must lie within (0, 1], got {rising}")
    return _Named(
        f"cyclical({period}, rising={rising}, end={end})",
        lambda step: end * min((step % period) / (rising * period), 1.0),
    )
