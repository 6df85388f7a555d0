"""Priors over one parameter tensor. A custom prior is one decorated class; see `register`."""

from varify.priors.conjugate import Conjugate, ConjugateKnownMean
from varify.priors.distribution import Factorized
from varify.priors.gaussian import Gaussian
from varify.priors.mixture import ScaleMixture
from varify.priors.registry import PriorLike, as_prior, names, register
from varify.weights.prior import Prior

__all__ = [
    "Conjugate",
    "ConjugateKnownMean",
    "Factorized",
    "Gaussian",
    "Prior",
    "PriorLike",
    "ScaleMixture",
    "as_prior",
    "names",
    "register",
]
