"""The Gaussian prior, and its exact KL."""

import copy
import math
from typing import Any, TypeGuard

import torch
from torch import Tensor

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
    """

    mean: Tensor | float
    std: Tensor | float | None
    bias_std: float | None

    def __init__(
        self,
        mean: Tensor | float = 0.0,
        std: Tensor | float | None = None,
        bias_std: float | None = None,
        centered: bool = False,
    ) -> None:
        super().__init__()
        if centered and (isinstance(mean, Tensor) or mean != 0):
            raise PriorError("mean and centered=True exclude each other: centered takes the parameter for the mean")
        self.keep(mean=mean)
        self.std = None
        if std is not None:
            del self.std
            self.keep_positive(std=std)
        self.bias_std = bias_std
        if bias_std is not None:
            self.keep_positive(bias_std=bias_std)
        self.centered = bool(centered)

    def for_parameter(self, w: Tensor, fan_in: int) -> "Gaussian":  # noqa: D102
        std = self.std
        if std is None:
            std = self.bias_std if self.bias_std is not None and w.dim() < 2 else 1 / math.sqrt(max(fan_in, 1))
        settled = self._with(w.detach() if self.centered else self.mean, std)
        return super(Gaussian, settled).for_parameter(w, fan_in)  # type: ignore[return-value]

    @classmethod
    def check_settings(cls, settings: dict[str, Any], shape: torch.Size) -> None:  # noqa: D102
        super().check_settings(settings, shape)
        if settings.get("std") is None:  # a parameter's own prior has one
            raise PriorError("std must be a number or the shape of a tensor, got None")

    def _with(self, mean: Tensor | float, std: Tensor | float) -> "Gaussian":
        """One of this class, with what else a subclass has, and these for mean and std."""
        new = copy.deepcopy(self)
        for name in ("mean", "std"):
            delattr(new, name)
        new.keep(mean=mean)
        new.keep_positive(std=std)
        new.bias_std, new.centered = None, False
        return new

    def log_prob(self, w: Tensor) -> Tensor:  # noqa: D102
        return normal_log_density((w - self.mean) / self._known_std(), self._known_std()).sum()

    def stddev(self) -> Tensor | float | None:  # noqa: D102
        return self.std

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
