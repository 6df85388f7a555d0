"""How mu and rho start. A custom initialization is one decorated class; see `register`."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from varify.errors import InitError, PriorError, listed, positive_number
from varify.naming import named
from varify.network.parameters import Slot
from varify.network.tree import HALF
from varify.priors import Gaussian, Prior
from varify.weights.posterior import softplus_inverse
from varify.weights.prior import broadcasts

__all__ = [
    "Constant",
    "Init",
    "InitLike",
    "Moped",
    "Normal",
    "OfWeights",
    "Relative",
    "ZeroMean",
    "as_init",
    "register",
    "softplus_inverse",
]


class Init:
    """mu and rho of one parameter from its value and the scale of its prior."""

    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:
        """Start values.

        Args:
            w: `(*shape)`, the parameter, in single precision or better.
            prior_std: `(*shape)`, the prior's standard deviation; 1/sqrt(fan_in) where the prior tells none. A view,
                not to be written into.

        Returns:
            mu and rho, each `(*shape)`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(w, prior_std)")


InitType = TypeVar("InitType", bound=type[Init])
# What `variationalize` takes for an initialization: a name, an `Init`, or None for the default.
InitLike = str | Init | None
_BY_NAME: dict[str, type[Init]] = {}


def register(name: str) -> Callable[[InitType], InitType]:
    """Decorate an `Init` class, which needs no arguments, that is to be known by a name.

    ```python
    @varify.inits.register("wide")
    class Wide(varify.inits.Init):
        def __call__(self, w, prior_std):  # mu and rho, each (*shape)
            return w, varify.inits.softplus_inverse(2 * prior_std)
    ```

    Raises:
        InitError: the name is that of another class.
    """
    return named(name, Init, "varify.inits.Init", _BY_NAME, InitError)


def as_init(init: InitLike) -> Init:
    """An `Init` from None (the default), a name, or an `Init`.

    Raises:
        InitError: it is none of these.
    """
    if init is None:
        return OfWeights()
    if isinstance(init, Init):
        return init
    if isinstance(init, str) and init in _BY_NAME:
        return _BY_NAME[init]()
    raise InitError(f"init must be a varify.inits.Init or one of {listed(_BY_NAME, 99)}, got {init!r}")


@register("of_weights")
class OfWeights(Init):
    """mu = w, sigma = scale · the root mean square of the tensor's weights. The default.

    A tenth of a weight's size is where a network still does what it did, and from where training finds sigma in few
    steps, whatever the prior. A tensor of zeros, or of one number, has no size of its own, and is taken to be of the
    prior's std, but at most 0.1.
    """

    def __init__(self, scale: float = 0.1) -> None:
        self.scale = positive_number("scale", scale, InitError)

    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        size = w.square().mean().sqrt() if w.numel() > 1 else w.new_zeros(())
        std = size.expand_as(w) if size > 0 else prior_std.clamp_max(0.1)
        return w, softplus_inverse(self.scale * std)


@register("relative")
class Relative(Init):
    """mu = w, sigma = scale · the prior's std."""

    def __init__(self, scale: float = 0.1) -> None:
        self.scale = positive_number("scale", scale, InitError)

    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return w, softplus_inverse(self.scale * prior_std)


@register("constant")
class Constant(Init):
    """mu = w, the same sigma everywhere."""

    def __init__(self, sigma: float = 0.01) -> None:
        self.sigma = positive_number("sigma", sigma, InitError)

    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return w, softplus_inverse(torch.full_like(w, self.sigma))


@register("zero_mean")
class ZeroMean(Init):
    """mu = 0, sigma = the prior's std, as PyVarInf starts: with a Gaussian prior of mean 0 the KL starts at 0."""

    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return torch.zeros_like(w), softplus_inverse(prior_std)


@register("normal")
class Normal(Init):
    """mu and rho each drawn from a normal, as in PyTorch-BayesianCNN and BLiTZ; the weights given are dropped.

    Args:
        mu: mean and standard deviation of mu.
        rho: of rho. BayesianCNN starts with (-3, 0.1), BLiTZ with (-7, 0.1) in linear layers and (-6, 0.1) elsewhere.
    """

    def __init__(self, mu: tuple[float, float] = (0.0, 0.1), rho: tuple[float, float] = (-3.0, 0.1)) -> None:
        for name, pair in (("mu", mu), ("rho", rho)):
            if len(pair) != 2 or not pair[1] >= 0:
                raise InitError(f"{name} must be (mean, standard deviation), got {pair!r}")
        self.mu, self.rho = mu, rho

    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return torch.empty_like(w).normal_(*self.mu), torch.empty_like(w).normal_(*self.rho)


@register("moped")
class Moped(Init):
    """mu = w, sigma = delta·|w| (MOPED, Krishnan et al. 2020, arXiv:1906.05323).

    Args:
        delta: relative standard deviation.
        floor: least sigma, in weight units. A weight of exactly 0 would have none and could never get one, since the
            gradient of rho vanishes with sigma.
    """

    def __init__(self, delta: float = 0.1, floor: float = 1e-5) -> None:
        self.delta = positive_number("delta", delta, InitError)
        self.floor = positive_number("floor", floor, InitError)

    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return w, softplus_inverse((self.delta * w.abs()).clamp_min(self.floor))


@torch.no_grad()
def started(init: Init, slot: Slot, prior: Prior) -> tuple[Tensor, Tensor]:
    """Mu and rho of the parameter in `slot`, each `(*shape)`, rho in a storage of its own.

    Raises:
        PriorError: the prior's `stddev` can't be one.
    """
    w = slot.parameter.detach()
    w = w.float() if w.dtype in HALF else w
    std = prior.stddev()
    if std is None:
        std = Gaussian().for_parameter(w, slot.fan_in).stddev()
    std = torch.as_tensor(std, dtype=w.dtype, device=w.device)
    if not broadcasts(std.shape, w.shape) or not ((std > 0) & std.isfinite()).all():
        raise PriorError(
            f"{slot.name}: stddev of {prior!r} must be None, or positive, finite and broadcastable to {tuple(w.shape)}"
        )
    pair = init(w, std.expand_as(w))
    if not isinstance(pair, tuple) or [getattr(t, "shape", None) for t in pair] != [w.shape, w.shape]:
        shapes = [tuple(getattr(t, "shape", ())) for t in pair] if isinstance(pair, tuple) else type(pair).__name__
        raise InitError(
            f"{slot.name}: {type(init).__name__} must return mu and rho, each of shape {tuple(w.shape)}, got {shapes}"
        )
    mu, rho = pair
    rho = rho.contiguous()
    others = {t.untyped_storage().data_ptr() for t in (w, std, mu)}
    return mu, rho.clone() if rho.untyped_storage().data_ptr() in others else rho
