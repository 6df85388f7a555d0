"""What an experiment is: its settings, each of which is an option of `varify train` and a key of a TOML file."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_type_hints

from varify import VarifyError, inits, priors
from varify.experiments.data.augmentation import KINDS as AUGMENTATIONS
from varify.experiments.data.sets import DATA
from varify.experiments.errors import SettingsError, nearest
from varify.experiments.models.networks import ACTIVATIONS, MODELS
from varify.experiments.spelling import parsed_prior, parsed_schedule

NETWORKS = ("both", "plain", "variational")
OPTIMIZERS = ("adam", "ivon")
PLANS = ("cosine", "constant", "plateau")


def setting(default: Any, meaning: str, among: tuple[str, ...] = ()) -> Any:
    """A field with its help; `among`: the values that it may have."""
    return field(default=default, metadata={"help": meaning, "among": among})


@dataclass(frozen=True)
class Settings:
    """One experiment; the defaults are those of `varify train`, and None is the library's own default."""

    model: str = setting("lenet", f"{', '.join(MODELS)}, or package.module:factory of your own")
    activation: str | None = setting(None, "of a built-in model, in place of its own", tuple(ACTIVATIONS))
    networks: str = setting("both", "which to train: a plain (frequentist) one, its variational twin, both", NETWORKS)
    data: str = setting("digits", f"{', '.join(DATA)}, or a folder of images")
    data_root: str = setting("data", "where torchvision keeps its data")
    download: bool = setting(False, "let torchvision download what is not there")
    size: int = setting(32, "pixels of an image's side; the built-in convolutional models take 32")
    validation: float = setting(
        0.0, "share of the training images held out, unaugmented; the best epoch on them is kept"
    )
    augment: str | None = setting(None, f"random changes of training images, some of {','.join(AUGMENTATIONS)}")
    ood: str = setting("letters", "images of another kind for the AUROC: letters, a data set, a folder")
    prior: str | None = setting(
        None, f"{', '.join(priors.names())}, with values as in mixtgauss:sigma_1=1,sigma_2=0.01,pi=0.5"
    )
    init: str | None = setting(None, "of mu and rho: of_weights, relative, constant, zero_mean, normal, moped")
    where: str | None = setting(None, "glob on parameter names: which are variational")
    estimator: str | None = setting(None, "of gradients: auto, weights, local, flipout, or one with rules of your own")
    optimizer: str = setting("adam", "of the variational network; the plain one has adam", OPTIMIZERS)
    lr: float = setting(2e-3, "adam's rate, of weights and means")
    rho_lr: float | None = setting(None, "adam's rate of the rho's")
    ivon_lr: float = setting(0.3, "ivon's rate")
    hess_init: float = setting(1.0, "ivon's first curvature: 1 for a thousand images, 0.1 for sixty thousand")
    lr_plan: str = setting("cosine", "of the rates; plateau: a tenth after six epochs without a lower NLL", PLANS)
    beta: str = setting("auto", "weight of the KL: a number, 1 for the evidence lower bound, or auto")
    kl_schedule: str = setting(
        "constant", "what beta is multiplied by: constant, warm-up[:share of training], cyclical[:cycles], blundell"
    )
    epochs: int = setting(60, "passes over the data")
    batch_size: int = setting(64, "images a step")
    train_samples: int = setting(1, "draws of the weights a training step")
    n_samples: int = setting(64, "draws for a prediction")
    seed: int = setting(0, "of everything random")
    record: str | None = setting(None, "globs of parameters to record over training, as in conv1.weight,fc*")
    record_per_epoch: int = setting(4, "recordings an epoch")
    tensorboard: bool = setting(False, "write losses for TensorBoard into the run folder")

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for f in fields(self):
            object.__setattr__(self, f.name, _typed(f.name, getattr(self, f.name), kinds[f.name]))
            among, value = f.metadata["among"], getattr(self, f.name)
            if among and value is not None and value not in among:
                raise SettingsError(
                    f"{flag(f.name)} {value!r} is unknown; there are {', '.join(among)}{nearest(value, among)}"
                )
        for name in ("epochs", "batch_size", "n_samples", "train_samples", "record_per_epoch", "size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{flag(name)} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "rho_lr", "ivon_lr", "hess_init"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise SettingsError(f"{flag(name)} must be greater than 0, not {getattr(self, name)}")
        if not 0 <= self.validation < 1:
            raise SettingsError(f"validation must be a share of the data, within [0, 1), not {self.validation}")
        self._check_words()

    def _check_words(self) -> None:
        if ":" not in self.model and self.model not in MODELS:
            raise SettingsError(
                f"model {self.model!r} is unknown; there are {', '.join(MODELS)}, and package.module:factory for your "
                f"own{nearest(self.model, MODELS)}"
            )
        for kind in self.augmentations:
            if kind not in AUGMENTATIONS:
                raise SettingsError(f"augment {kind!r} is unknown; there are {', '.join(AUGMENTATIONS)}")
        if self.beta != "auto":
            try:
                number = float(self.beta)
            except ValueError:
                number = math.nan
            if not 0 <= number < math.inf:
                raise SettingsError(f"beta must be auto or a number of at least 0, not {self.beta}")
        if self.optimizer == "ivon" and self.kl_schedule != "constant":
            raise SettingsError("ivon has the KL in its step: kl-schedule must be constant with it")
        if self.optimizer == "ivon" and self.beta != "auto" and float(self.beta) == 0:
            raise SettingsError("ivon needs a beta greater than 0")
        parsed_schedule(self.kl_schedule)
        if self.model not in MODELS:
            return  # the user's module, which is imported later, may register priors and initializations
        self.make_prior()
        if self.init is not None:
            try:
                inits.as_init(self.init)
            except VarifyError as error:
                raise SettingsError(str(error)) from None

    @property
    def augmentations(self) -> list[str]:
        """Kinds of changes of training images."""
        return [kind.strip() for kind in self.augment.split(",")] if self.augment else []

    def make_prior(self) -> priors.Prior | None:
        """The prior that `prior` spells; None: the library's default."""
        return None if self.prior is None else parsed_prior(self.prior)

    @classmethod
    def of(cls, values: dict[str, Any], source: str) -> "Settings":
        """From a file's keys, with hyphens or underscores.

        Raises:
            SettingsError: a key is unknown; the nearest one is named.
        """
        known = {f.name for f in fields(cls)}
        given = {key.replace("-", "_"): value for key, value in values.items()}
        for key in given.keys() - known:
            raise SettingsError(f"{source}: there is no setting {key!r}{nearest(key, sorted(known))}")
        try:
            return cls(**given)
        except SettingsError as error:
            raise SettingsError(f"{source}: {error}") from None

    def as_dict(self) -> dict[str, Any]:
        """By name."""
        return asdict(self)


def flag(name: str) -> str:
    """A setting as the command line writes it, without the hyphens before it."""
    return name.replace("_", "-")


def _typed(name: str, value: object, kind: Any) -> Any:
    """The value as a setting of this kind; an integer serves for a float, and any number for beta.

    Raises:
        SettingsError: it is of another kind.
    """
    kinds = getattr(kind, "__args__", (kind,))
    if name == "beta" and type(value) in (int, float):
        return str(value)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        words = {str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): ""}
        wanted = " or ".join(words[k] for k in kinds if words[k])
        raise SettingsError(f"{flag(name)} must be {wanted}, not {value!r}")
    return value
