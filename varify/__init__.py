"""varify: any torch network, made variational in one line."""

from varify import estimators, inits, priors, schedules
from varify.description import DescriptionLength, description_length
from varify.divergence import register_kl
from varify.errors import EstimatorError, InitError, ModelError, PriorError, SelectionError, StructureError, VarifyError
from varify.fitting import fit_prior, fit_sigma
from varify.likelihoods import GaussianLikelihood, HeteroscedasticGaussianLikelihood
from varify.module import VariationalModule, prior_loss
from varify.objective import ELBO, Terms, parameter_groups
from varify.posteriors import GaussianPosterior
from varify.prediction import Prediction
from varify.pruning import prune, pruning_curve
from varify.saving import load, save
from varify.variationalize import variationalize

__version__ = "0.1.0"
__all__ = [
    "ELBO",
    "DescriptionLength",
    "EstimatorError",
    "GaussianLikelihood",
    "GaussianPosterior",
    "HeteroscedasticGaussianLikelihood",
    "InitError",
    "ModelError",
    "Prediction",
    "PriorError",
    "SelectionError",
    "StructureError",
    "Terms",
    "VariationalModule",
    "VarifyError",
    "description_length",
    "estimators",
    "fit_prior",
    "fit_sigma",
    "inits",
    "load",
    "parameter_groups",
    "prior_loss",
    "priors",
    "prune",
    "pruning_curve",
    "register_kl",
    "save",
    "schedules",
    "variationalize",
]
