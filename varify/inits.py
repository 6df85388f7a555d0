"""How mu and rho start. An initialisation of one's own: subclass `Init`, give it a `kind`."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from varify.errors import InitError, listed
from varify.weights.posterior import softplus_inverse

KINDS: dict[str, "type[Init]"] = {}


class Init:
    """mu and rho of one parameter from its value and the scale of its prior."""

    kind: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        if cls.kind:
            KINDS[cls.kind] = cls

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


def as_init(init: Any) -> Init:
    """An `Init` from None (the default), a name, or an `Init`."""
    if init is None:
        return Relative()
    if isinstance(init, Init):
        return init
    if isinstance(init, str) and init in KINDS:
        return KINDS[init]()
    raise InitError(f"init={init!r}: a varify.inits.Init or one of the names {listed(KINDS, 99)} is needed")


def _positive(name: str, value: float) -> float:
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise InitError(f"{name}={value!r}: a number greater than 0 is needed")
    return float(value)


class Relative(Init):
    """mu = w, sigma = scale · the prior's std. The default."""

    kind = "relative"

    def __init__(self, scale: float = 0.1) -> None:
        self.scale = _positive("scale", scale)

    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return w, softplus_inverse(self.scale * prior_std)


class Constant(Init):
    """mu = w, the same sigma everywhere."""

    kind = "constant"

    def __init__(self, sigma: float = 0.01) -> None:
        self.sigma = _positive("sigma", sigma)

    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return w, softplus_inverse(torch.full_like(w, self.sigma))


class ZeroMean(Init):
    """mu = 0, sigma = the prior's std, as PyVarInf starts: with a Gaussian prior of mean 0 the KL starts at 0."""

    kind = "zero_mean"

    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return torch.zeros_like(w), softplus_inverse(prior_std)


class Normal(Init):
    """mu and rho each drawn from a normal, as in PyTorch-BayesianCNN and BLiTZ; the weights given are dropped.

    Args:
        mu: mean and standard deviation of mu.
        rho: of rho. BayesianCNN starts with (-3, 0.1), BLiTZ with (-7, 0.1) in linear layers and (-6, 0.1) elsewhere.
    """

    kind = "normal"

    def __init__(self, mu: tuple[float, float] = (0.0, 0.1), rho: tuple[float, float] = (-3.0, 0.1)) -> None:
        for name, pair in (("mu", mu), ("rho", rho)):
            if len(pair) != 2 or not pair[1] >= 0:
                raise InitError(f"{name}={pair!r}: (mean, standard deviation) is needed")
        self.mu, self.rho = mu, rho

    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return torch.empty_like(w).normal_(*self.mu), torch.empty_like(w).normal_(*self.rho)


class Moped(Init):
    """mu = w, sigma = delta·|w| (MOPED, Krishnan et al. 2020, arXiv:1906.05323).

    Args:
        delta: relative standard deviation.
        floor: least sigma, in weight units. A weight of exactly 0 would have none and could never get one, since the
            gradient of rho vanishes with sigma.
    """

    kind = "moped"

    def __init__(self, delta: float = 0.1, floor: float = 1e-5) -> None:
        self.delta, self.floor = _positive("delta", delta), _positive("floor", floor)

    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return w, softplus_inverse((self.delta * w.abs()).clamp_min(self.floor))
