"""The Gaussian prior, and its exact KL."""

import copy
import math
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from varify.errors import PriorError
from varify.priors.registry import register
from varify.weights.kl import register_kl
from varify.weights.posterior import GaussianPosterior
from varify.weights.prior import Prior

LOG_2PI = math.log(2 * math.pi)
AT_PRIOR = 0.01  # nats: a weight of less divergence says nothing that the prior does not


@register("gaussian")
class Gaussian(Prior):
    """N(mean, std²) on every weight; the KL is exact.

    Args:
        mean: number, or tensor broadcastable to the parameter.
        std: likewise, > 0. Default: 1/sqrt(fan_in); fan_in is the product of all dimensions but the first, and for
            a parameter with less than two dimensions that of the layer which owns it.
        bias_std: the default for parameters with less than two dimensions, instead; 0.01 is PyVarInf's.
        centered: the mean is the parameter's value at the time the prior is set, as one wants for a pretrained
            checkpoint.
        learn_std: whether the std is learned by the gradient of the KL, one number for a parameter that starts at
            `std`: empirical Bayes along with the training. Its logarithm is then a parameter of the variational module,
            `prior.<name>.log_std`. An optimizer that takes no KL, such as IVON, leaves it: `varify.fit_prior` sets it.
    """

    mean: Tensor | float
    std: Tensor | float | None
    bias_std: float | None
    log_std: nn.Parameter

    def __init__(
        self,
        mean: Tensor | float = 0.0,
        std: Tensor | float | None = None,
        bias_std: float | None = None,
        centered: bool = False,
        learn_std: bool = False,
    ) -> None:
        super().__init__()
        if centered and (isinstance(mean, Tensor) or mean != 0):
            raise PriorError("mean and centered=True exclude each other: centered takes the parameter for the mean")
        if learn_std and isinstance(std, Tensor) and std.dim():
            raise PriorError(
                f"std has shape {tuple(std.shape)} and learn_std=True learns one number for a parameter: give a number "
                "to start with, or none for 1/sqrt(fan_in)"
            )
        self.keep(mean=mean)
        self.learn_std = bool(learn_std)
        self.std = None
        if std is not None:
            del self.std
            self.keep_positive(std=std)
        self.bias_std = bias_std
        if bias_std is not None:
            self.keep_positive(bias_std=bias_std)
        self.centered = bool(centered)

    def for_parameter(self, w: Tensor, fan_in: int) -> "Gaussian":  # noqa: D102
        std = self.stddev()  # of one that was learned, the number
        if std is None:
            std = self.bias_std if self.bias_std is not None and w.dim() < 2 else 1 / math.sqrt(max(fan_in, 1))
        settled = self._with(w.detach() if self.centered else self.mean, std)
        bound: Gaussian = super(Gaussian, settled).for_parameter(w, fan_in)  # type: ignore[assignment]
        if self.learn_std:
            bound._learn(w)
        return bound

    def __getattr__(self, name: str) -> Any:
        log_std = self.__dict__.get("_parameters", {}).get("log_std") if name == "std" else None
        return super().__getattr__(name) if log_std is None else log_std.exp()

    def _learn(self, like: Tensor) -> None:
        """Make a parameter of the std."""
        std = float(self._known_std())  # as yet a number
        del self.std
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.log_std = nn.Parameter(torch.tensor(math.log(std), dtype=dtype, device=like.device))

    def adopt(self, before: Prior) -> None:  # noqa: D102
        if self.learn_std and isinstance(before, Gaussian) and "log_std" in before._parameters:
            self.__dict__.pop("std", None)
            self.log_std = before.log_std

    def settings(self) -> dict[str, Any]:  # noqa: D102
        std = self.stddev()
        learned = {"std": float(std)} if self.learn_std and std is not None else {}
        return {**super().settings(), **learned}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: object) -> None:
        log_std = state_dict.get(prefix + "log_std")
        if self.learn_std and isinstance(log_std, Tensor) and "log_std" not in self._parameters:
            self._learn(log_std)  # made of settings, and not yet for a parameter
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @classmethod
    def check_settings(cls, settings: dict[str, Any], shape: torch.Size) -> None:  # noqa: D102
        super().check_settings(settings, shape)
        if settings.get("std") is None:  # a parameter's own prior has one
            raise PriorError("std must be a number or the shape of a tensor, got None")

    def _with(self, mean: Tensor | float, std: Tensor | float) -> "Gaussian":
        """One of this class, with what else a subclass has, and these for mean and std."""
        new = copy.deepcopy(self)
        for name in ("mean", "log_std" if "log_std" in new._parameters else "std"):
            delattr(new, name)
        new.keep(mean=mean)
        new.keep_positive(std=std)
        new.bias_std, new.centered = None, False
        return new

    def log_prob(self, w: Tensor) -> Tensor:  # noqa: D102
        return normal_log_density((w - self.mean) / self._known_std(), self._known_std()).sum()

    def stddev(self) -> Tensor | float | None:  # noqa: D102
        return self.std.detach() if isinstance(self.std, Tensor) else self.std

    def _known_std(self) -> Tensor | float:
        if self.std is None:
            raise PriorError(
                "a Gaussian prior without std has one only for a parameter: use for_parameter, or give std"
            )
        return self.std


def is_gaussian(prior: Prior) -> TypeGuard[Gaussian]:
    """Whether its density is the Gaussian one, which a subclass may have replaced by another."""
    return isinstance(prior, Gaussian) and type(prior).log_prob is Gaussian.log_prob


def normal_log_density(z: Tensor, std: Tensor | float) -> Tensor:
    """Log N(x; m, std²) with z = (x − m)/std."""
    log_std = std.log() if isinstance(std, Tensor) else math.log(std)
    return -0.5 * z.square() - log_std - 0.5 * LOG_2PI


@register_kl(GaussianPosterior, Gaussian)
def _kl_gaussian(q: GaussianPosterior, p: Gaussian) -> Tensor:
    # Σ log(s/sigma) + (sigma² + (mu − m)²)/2s² − ½
    std = p._known_std()
    sigma, log_rest = q.floored_sigma()
    ratio = (sigma / std).flatten()
    shift = q.mean - p.mean if isinstance(p.mean, Tensor) or p.mean else q.mean
    squares = ratio.dot(ratio) + _sum_of_squares(shift, std)
    return 0.5 * squares - ratio.log().sum() - (0.5 * ratio.numel() + log_rest.sum())


def kl_of_each_weight(q: GaussianPosterior) -> Tensor:
    """KL(q‖prior) of every free weight by itself, `(n,)`, nats, for a Gaussian prior; their sum is the divergence."""
    q = q.unmasked()
    assert isinstance(q.prior, Gaussian)
    std = q.prior._known_std()
    sigma, log_rest = q.floored_sigma()
    ratio, shift = sigma / std, (q.mean - q.prior.mean) / std
    return (0.5 * (ratio.square() + shift.square() - 1) - ratio.log() - log_rest).flatten()


def _sum_of_squares(x: Tensor, scale: Tensor | float) -> Tensor:
    """Σ (x/scale)²: a dot product makes no tensor of the size of x, and dividing by a number afterwards neither."""
    x = (x / scale if isinstance(scale, Tensor) else x).flatten()
    return x.dot(x) if isinstance(scale, Tensor) else x.dot(x) / scale**2
