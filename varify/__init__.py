"""varify: any torch network, made variational in one line."""

from varify import inits, priors
from varify.divergence import register_kl
from varify.errors import InitError, ModelError, PriorError, SelectionError, StructureError, VarifyError
from varify.module import VariationalModule, prior_loss
from varify.posteriors import GaussianPosterior
from varify.prediction import Prediction
from varify.variationalize import variationalize

__version__ = "0.1.0"
__all__ = [
    "GaussianPosterior",
    "InitError",
    "ModelError",
    "Prediction",
    "PriorError",
    "SelectionError",
    "StructureError",
    "VariationalModule",
    "VarifyError",
    "inits",
    "prior_loss",
    "priors",
    "register_kl",
    "variationalize",
]
