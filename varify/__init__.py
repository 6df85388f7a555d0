"""varify: any torch network, made variational in one line."""

from varify import estimators, inits, optim, plots, priors, propagation, testing
from varify.analysis.description_length import DescriptionLength, description_length
from varify.analysis.diagnose import diagnose
from varify.analysis.findings import Diagnosis, Finding
from varify.analysis.fit_prior import fit_prior
from varify.analysis.fit_sigma import fit_sigma
from varify.analysis.fit_temperature import fit_temperature
from varify.analysis.pruning import prune, pruning_curve
from varify.analysis.update_prior import update_prior
from varify.any_network import predict
from varify.ensembles import load_ensemble
from varify.errors import (
    ArgumentError,
    EstimatorError,
    FileError,
    InitError,
    MissingFileError,
    ModelError,
    PriorError,
    PropagationError,
    SelectionError,
    StructureError,
    UnknownNameError,
    UnsavableError,
    VarifyError,
    VarifyWarning,
)
from varify.module import VariationalModule
from varify.objective import schedules
from varify.objective.elbo import ELBO, Terms, kl_weight, parameter_groups
from varify.objective.likelihoods import GaussianLikelihood, HeteroscedasticGaussianLikelihood
from varify.objective.other_likelihoods import (
    LaplaceLikelihood,
    OrdinalLikelihood,
    PoissonLikelihood,
    StudentTLikelihood,
)
from varify.predicting import generate
from varify.prediction.ensemble import Ensemble
from varify.prediction.prediction import Prediction
from varify.propagation.prediction import GaussianPrediction
from varify.serialization import load, save
from varify.variationalize import variationalize
from varify.weights.kl import register_kl
from varify.weights.posterior import GaussianPosterior
from varify.within import prior_loss

__version__ = "0.1.0"
__all__ = [
    "ELBO",
    "ArgumentError",
    "DescriptionLength",
    "Diagnosis",
    "Ensemble",
    "EstimatorError",
    "FileError",
    "Finding",
    "GaussianLikelihood",
    "GaussianPosterior",
    "GaussianPrediction",
    "HeteroscedasticGaussianLikelihood",
    "InitError",
    "LaplaceLikelihood",
    "MissingFileError",
    "ModelError",
    "OrdinalLikelihood",
    "PoissonLikelihood",
    "Prediction",
    "PriorError",
    "PropagationError",
    "SelectionError",
    "StructureError",
    "StudentTLikelihood",
    "Terms",
    "UnknownNameError",
    "UnsavableError",
    "VariationalModule",
    "VarifyError",
    "VarifyWarning",
    "description_length",
    "diagnose",
    "estimators",
    "fit_prior",
    "fit_sigma",
    "fit_temperature",
    "generate",
    "inits",
    "kl_weight",
    "load",
    "load_ensemble",
    "optim",
    "parameter_groups",
    "plots",
    "predict",
    "prior_loss",
    "priors",
    "propagation",
    "prune",
    "pruning_curve",
    "register_kl",
    "save",
    "schedules",
    "testing",
    "update_prior",
    "variationalize",
]
