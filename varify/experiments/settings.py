"""What an experiment is: its settings, and the prior as the command line writes it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from varify import VarifyError, priors
from varify.experiments.data import DATA
from varify.experiments.models import MODELS

# Hyper-parameters of the command line's priors where none are given; PyVarInf's own experiment used these.
PRIOR_DEFAULTS: dict[str, dict[str, float]] = {
    "mixtgauss": {"sigma_1": 0.2, "sigma_2": 0.02, "pi": 0.5},
    "conjugate": {"mu_0": 0.0, "kappa_0": 3.0, "alpha_0": 0.5, "beta_0": 0.5},
    "conjugate_known_mean": {"mean": 0.0, "alpha_0": 0.5, "beta_0": 0.5},
}


class SettingsError(Exception):
    """A setting can't be; the message says which and what may."""


@dataclass(frozen=True)
class Settings:
    """One experiment; the defaults are those of `varify train`.

    Attributes:
        prior: name, or `name:key=value,key=value`.
        beta: weight of the KL. 1 is the evidence lower bound; with 61,000 weights and 1,348 digits the default is
            tempered.
        rho_lr: learning rate of the rho's. They have a long way to go from where they start.
    """

    model: str = "lenet"
    data: str = "digits"
    data_root: str = "data"
    prior: str = "gaussian"
    epochs: int = 60
    batch_size: int = 64
    lr: float = 3e-3
    rho_lr: float = 3e-2
    beta: float = 0.01
    n_samples: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("model", MODELS), ("data", DATA)):
            if getattr(self, name) not in known:
                raise SettingsError(f"{name} {getattr(self, name)!r} is unknown; there are {', '.join(known)}")
        for name in ("epochs", "batch_size", "n_samples", "lr", "rho_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingsError(f"{name.replace('_', '-')} must be greater than 0, not {getattr(self, name)}")
        if not 0 <= self.beta < math.inf:
            raise SettingsError(f"beta must be at least 0, not {self.beta}")
        self.make_prior()

    def make_prior(self) -> priors.Prior:
        """The prior that `prior` spells."""
        name, _, rest = self.prior.partition(":")
        hyperparameters: dict[str, Any] = dict(PRIOR_DEFAULTS.get(name, {}))
        try:
            for pair in rest.split(",") if rest else []:
                key, _, value = pair.partition("=")
                hyperparameters[key.strip()] = int(value) if key.strip() == "n_mc_samples" else float(value)
            return priors.as_prior(name, **hyperparameters)
        except ValueError as error:
            kind = "" if isinstance(error, VarifyError) else " (it is written name:key=number,key=number)"
            raise SettingsError(f"prior {self.prior!r}: {error}{kind}") from None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
