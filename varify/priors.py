"""Priors over one parameter tensor, and the names that `set_prior` knows them by.

A prior of one's own is one decorated class; see `register`.
"""

import copy
import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, distributions, nn

from varify.divergence import register_kl
from varify.errors import PriorError, listed
from varify.posteriors import GaussianPosterior

LOG_2PI = math.log(2 * math.pi)
P = TypeVar("P", bound="type[Prior]")
KINDS: dict[str, "type[Prior]"] = {}
MOST_DRAWS = 100_000  # in one estimate of a KL: its memory and time grow with them


def register(kind: str) -> Callable[[P], P]:
    """Make a `Prior` class known by name, for `set_prior(kind, ...)` and for checkpoints.

    ```python
    @varify.priors.register("cauchy")
    class Cauchy(varify.priors.Prior):
        def __init__(self, scale, n_mc_samples=1):
            super().__init__(n_mc_samples)
            self.keep_positive(scale=scale)     # checked, and kept as self.scale

        def log_prob(self, w):                  # the log density of the whole tensor, scalar ()
            return torch.distributions.Cauchy(0.0, self.scale).log_prob(w).sum()
    ```

    Raises:
        PriorError: the name is that of another class.
    """

    def decorate(prior_type: P) -> P:
        former = KINDS.get(kind)
        if former is not None and former.__qualname__ != prior_type.__qualname__:
            raise PriorError(f"the name {kind!r} is taken by {former.__qualname__}; choose another")
        prior_type.kind = kind
        KINDS[kind] = prior_type
        return prior_type

    return decorate


def make(kind: Any, **hyperparameters: Any) -> "Prior":
    """A prior from whatever a user may write: a name with hyper-parameters, a `Prior`, a torch distribution.

    Raises:
        PriorError: the name or a hyper-parameter is unknown, one is missing, or it has a value that can't be.
    """
    if isinstance(kind, distributions.Distribution):
        wrap: Callable[..., Prior] = KINDS["distribution"]
        return wrap(kind, **hyperparameters)
    if isinstance(kind, Prior):
        if hyperparameters:
            raise PriorError(f"{kind!r} has its hyper-parameters already; {listed(hyperparameters)} can't be added")
        return kind
    if isinstance(kind, type) and issubclass(kind, Prior):
        raise PriorError(f"prior={kind.__name__} is a class: pass an instance, {kind.__name__}(...)")
    if not isinstance(kind, str):
        raise PriorError(
            f"prior={kind!r}: a name ({listed(KINDS, 9)}), a varify.priors.Prior or a "
            "torch.distributions.Distribution is needed"
        )
    if kind not in KINDS:
        raise PriorError(f"unknown prior {kind!r}; there are {listed(KINDS, 99)}")
    try:
        inspect.signature(KINDS[kind]).bind(**hyperparameters)
    except TypeError as error:
        takes = ", ".join(str(p) for p in inspect.signature(KINDS[kind]).parameters.values())
        raise PriorError(f"prior {kind!r}: {error}; it takes {takes}") from None
    return KINDS[kind](**hyperparameters)


class Prior(nn.Module):
    """p(w) for one parameter tensor w of shape `(*shape)`.

    A subclass keeps each hyper-parameter as an attribute of the name that its argument has: `keep` and
    `keep_positive` check and do that, and make a buffer of a tensor, so that it moves and is saved with the network.

    Args:
        n_mc_samples: draws of w in the estimate of the KL, where it has no closed form.
    """

    kind: ClassVar[str] = ""

    def __init__(self, n_mc_samples: int = 1) -> None:
        super().__init__()
        whole = isinstance(n_mc_samples, int) and not isinstance(n_mc_samples, bool)
        if not whole or not 1 <= n_mc_samples <= MOST_DRAWS:
            needed = f"a whole number of draws, at least 1 and at most {MOST_DRAWS:,}, is needed"
            raise PriorError(f"n_mc_samples={n_mc_samples!r}: {needed}")
        self.n_mc_samples = n_mc_samples

    def log_prob(self, w: Tensor) -> Tensor:
        """Log p(w) of the whole tensor: w `(*shape)` to a scalar `()`, nats. A subclass must define it."""
        raise NotImplementedError(f"{type(self).__name__} must define log_prob(w)")

    def weight_std(self) -> "Tensor | float | None":
        """Standard deviation of one weight, broadcastable to `(*shape)`; None where the prior tells none."""
        return None

    def for_parameter(self, w: Tensor, fan_in: int) -> "Prior":
        """The prior of this one parameter: a copy beside `w`, with what depends on it filled in.

        Args:
            w: `(*shape)`, the value that the parameter has now.
            fan_in: number of inputs of the layer that owns it.

        Raises:
            PriorError: a tensor hyper-parameter doesn't fit the shape of `w`.
        """
        for name, value in self.named_buffers():
            if not broadcasts(value.shape, w.shape):
                raise PriorError(f"{name} has shape {tuple(value.shape)}; the parameter has {tuple(w.shape)}")
        return copy.deepcopy(self).to(w.device)

    def at(self, chosen: Tensor) -> "Prior":
        """The prior of some weights alone, as a vector; `chosen` is `(*shape)` of bool."""
        buffers = dict(self.named_buffers())
        if not buffers:
            return self
        prior = copy.copy(self)
        prior._buffers = {name: value.expand(chosen.shape)[chosen] for name, value in buffers.items()}
        return prior

    def settings(self) -> dict[str, Any]:
        """The arguments that make this prior again: numbers and strings; of a tensor, its shape as a list."""
        values = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return {name: list(v.shape) if isinstance(v, Tensor) else v for name, v in values.items()}

    @classmethod
    def check_settings(cls, settings: dict[str, Any], shape: torch.Size) -> None:
        """Refuse settings out of a checkpoint that can't be those of a parameter of `shape`; makes no tensor.

        A class with a `from_settings` of its own checks them there, or here.

        Raises:
            PriorError: a setting is missing or unknown, or a tensor's shape doesn't fit the parameter's.
        """
        if cls.from_settings.__func__ is not Prior.from_settings.__func__:  # type: ignore[attr-defined]
            return
        try:
            inspect.signature(cls).bind(**settings)
        except TypeError as error:
            raise PriorError(str(error)) from None
        for name, value in settings.items():
            if isinstance(value, list) and not broadcasts(checked_shape(name, value), shape):
                raise PriorError(f"{name} has shape {tuple(value)}; the parameter has {tuple(shape)}")

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "Prior":
        """The inverse of `settings`: tensors hold 0.5, which all may be, until a state dict fills them."""
        values: dict[str, Any] = {n: torch.full(v, 0.5) if isinstance(v, list) else v for n, v in settings.items()}
        return cls(**values)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name, buffer in self._buffers.items():
            found = state_dict.get(prefix + name)
            if not isinstance(found, Tensor) or buffer is None or found.shape != buffer.shape:
                continue  # which torch reports
            dtype = torch.promote_types(found.dtype, buffer.dtype)  # settings don't tell a tensor's type
            if is_room(buffer) or dtype != buffer.dtype:
                self._buffers[name] = torch.empty(found.shape, dtype=dtype, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def keep(self, **hyperparameters: Any) -> None:
        """Check that each is a finite number or tensor, and keep it under its name."""
        for name, value in hyperparameters.items():
            if isinstance(value, Tensor) and value.dim():
                self.register_buffer(
                    name, value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
                )
            elif isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
                raise PriorError(f"{name}={value!r}: a number or a tensor is needed")
            else:
                setattr(self, name, float(value))
            if not torch.as_tensor(getattr(self, name)).isfinite().all():
                raise PriorError(f"{name}={value!r}: it must be finite")

    def keep_positive(self, **hyperparameters: Any) -> None:
        """`keep`, of what must be greater than 0."""
        self.keep(**hyperparameters)
        for name, value in hyperparameters.items():
            if not (torch.as_tensor(getattr(self, name)) > 0).all():
                raise PriorError(f"{name}={value!r}: it must be greater than 0")

    def __repr__(self) -> str:
        defaults = {name: p.default for name, p in inspect.signature(type(self)).parameters.items()}
        told = ", ".join(f"{k}={_short(v)}" for k, v in self.settings().items() if v != defaults[k])
        return f"{type(self).__name__}({told})"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"tensor{tuple(value)}"
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def room(shape: Any) -> Tensor:
    """Stands for a tensor of `shape` until a state dict brings it; takes no memory, however large the shape."""
    return torch.full((), 0.5).expand(shape)


def is_room(tensor: Tensor) -> bool:
    """Whether a tensor is such."""
    return tensor.numel() > 1 and not any(tensor.stride())


def checked_shape(name: str, value: Any) -> torch.Size:
    """The shape that a checkpoint gives for the tensor `name`.

    Raises:
        PriorError: it is none.
    """
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**40 for n in value):
        raise PriorError(f"{name}={str(value)[:99]}: the shape of a tensor is needed")
    return torch.Size(value)


def broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    """Whether a tensor of `shape` can stand for one of `target`."""
    try:
        return bool(torch.broadcast_shapes(shape, target) == target)
    except RuntimeError:
        return False


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
        settled = Gaussian(w.detach() if self.centered else self.mean, std)
        return super(Gaussian, settled).for_parameter(w, fan_in)  # type: ignore[return-value]

    def log_prob(self, w: Tensor) -> Tensor:  # noqa: D102
        return _normal_log_density((w - self.mean) / self._known_std(), self._known_std()).sum()

    def weight_std(self) -> Tensor | float | None:  # noqa: D102
        return self.std

    def _known_std(self) -> Tensor | float:
        if self.std is None:
            raise PriorError(
                "a Gaussian prior without std has one only for a parameter: use for_parameter, or give std"
            )
        return self.std


def _normal_log_density(z: Tensor, std: Tensor | float) -> Tensor:
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


def _sum_of_squares(x: Tensor, scale: Tensor | float) -> Tensor:
    """Σ (x/scale)²: a dot product makes no tensor of the size of x, and dividing by a number afterwards neither."""
    x = (x / scale if isinstance(scale, Tensor) else x).flatten()
    return x.dot(x) if isinstance(scale, Tensor) else x.dot(x) / scale**2


@register("mixtgauss")
class ScaleMixture(Prior):
    """pi·N(0, sigma_1²) + (1 − pi)·N(0, sigma_2²) on every weight (Blundell et al. 2015, arXiv:1505.05424, eq. 7).

    Args:
        sigma_1: standard deviation of the first Gaussian, > 0.
        sigma_2: of the second.
        pi: probability of the first, within (0, 1).
        n_mc_samples: draws in the estimate of the KL.
    """

    sigma_1: Tensor | float
    sigma_2: Tensor | float
    pi: Tensor | float

    def __init__(self, sigma_1: Any, sigma_2: Any, pi: Any, n_mc_samples: int = 1) -> None:
        super().__init__(n_mc_samples)
        self.keep_positive(sigma_1=sigma_1, sigma_2=sigma_2)
        self.keep(pi=pi)
        inside = torch.as_tensor(self.pi)
        if not ((inside > 0) & (inside < 1)).all():
            raise PriorError(f"pi={pi!r}: it must lie within (0, 1)")

    def log_prob(self, w: Tensor) -> Tensor:  # noqa: D102
        pi = torch.as_tensor(self.pi, dtype=w.dtype, device=w.device)
        # logaddexp: a floor under the density instead would take the gradient from every large weight
        first = pi.log() + _normal_log_density(w / self.sigma_1, self.sigma_1)
        second = torch.log1p(-pi) + _normal_log_density(w / self.sigma_2, self.sigma_2)
        return torch.logaddexp(first, second).sum()

    def weight_std(self) -> Tensor | float:  # noqa: D102
        var: Tensor | float = self.pi * self.sigma_1**2 + (1 - self.pi) * self.sigma_2**2
        return var**0.5


@register("conjugate_known_mean")
class ConjugateKnownMean(Prior):
    """N(mean, var) on every weight of a tensor, var ~ InverseGamma(alpha_0, beta_0), integrated out.

    The weights of one tensor share the variance, so the prior learns the tensor's scale (Murphy 2007, Conjugate
    Bayesian analysis of the Gaussian distribution).

    Args:
        mean: the known mean.
        alpha_0: shape of the inverse gamma, > 0.
        beta_0: its scale, > 0.
        n_mc_samples: draws in the estimate of the KL.
    """

    mean: Tensor | float
    alpha_0: float
    beta_0: float

    def __init__(self, mean: Any, alpha_0: float, beta_0: float, n_mc_samples: int = 1) -> None:
        super().__init__(n_mc_samples)
        self.keep(mean=mean)
        self.keep_positive(alpha_0=_scalar("alpha_0", alpha_0), beta_0=_scalar("beta_0", beta_0))

    def log_prob(self, w: Tensor) -> Tensor:  # noqa: D102
        sum_of_squares = (w - self.mean).square().sum()
        return _inverse_gamma_marginal(self.alpha_0, self.beta_0, w.numel(), 0.5 * sum_of_squares)


@register("conjugate")
class Conjugate(Prior):
    """N(m, var) on every weight of a tensor, m | var ~ N(mu_0, var/kappa_0), var ~ InverseGamma(alpha_0, beta_0).

    Mean and variance are shared within a tensor and integrated out (Murphy 2007, section 3 ff.).

    Args:
        mu_0: prior mean of m.
        kappa_0: how many weights it counts for, > 0.
        alpha_0: shape of the inverse gamma, > 0.
        beta_0: its scale, > 0.
        n_mc_samples: draws in the estimate of the KL.
    """

    mu_0: float
    kappa_0: float
    alpha_0: float
    beta_0: float

    def __init__(self, mu_0: float, kappa_0: float, alpha_0: float, beta_0: float, n_mc_samples: int = 1) -> None:
        super().__init__(n_mc_samples)
        self.keep(mu_0=_scalar("mu_0", mu_0))
        self.keep_positive(
            kappa_0=_scalar("kappa_0", kappa_0), alpha_0=_scalar("alpha_0", alpha_0), beta_0=_scalar("beta_0", beta_0)
        )

    def log_prob(self, w: Tensor) -> Tensor:  # noqa: D102
        n, mean = w.numel(), w.mean()
        kappa_n = self.kappa_0 + n
        spread = 0.5 * (w - mean).square().sum() + self.kappa_0 * n * (mean - self.mu_0).square() / (2 * kappa_n)
        marginal = _inverse_gamma_marginal(self.alpha_0, self.beta_0, n, spread)
        return marginal + 0.5 * math.log(self.kappa_0 / kappa_n)


def _scalar(name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim():
        raise PriorError(f"{name} has shape {tuple(value.shape)}: one number is shared by a whole parameter tensor")
    return value


def _inverse_gamma_marginal(alpha_0: float, beta_0: float, n: int, spread: Tensor) -> Tensor:
    """Log density of n weights with the variance integrated out; `spread` is what they add to beta_0."""
    # in tensors, for torch.compile can't follow math.lgamma of a size that varies; in double precision on the CPU
    alpha = torch.tensor([alpha_0, alpha_0 + n / 2], dtype=torch.float64)
    before, after = torch.lgamma(alpha)
    constant = after - before + alpha_0 * math.log(beta_0) - n / 2 * LOG_2PI
    marginal: Tensor = constant - alpha[1] * (beta_0 + spread).log()
    return marginal.to(spread.dtype)
