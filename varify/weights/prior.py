"""A prior over one parameter tensor: the contract, and what every prior has."""

import copy
import inspect
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varify.errors import PriorError, positive_int

MOST_DRAWS = 100_000  # in one estimate of a KL: its memory and time grow with them


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
        self.n_mc_samples = positive_int("n_mc_samples", n_mc_samples, PriorError)
        if self.n_mc_samples > MOST_DRAWS:
            raise PriorError(f"n_mc_samples must be at most {MOST_DRAWS:,}, got {n_mc_samples}")

    def log_prob(self, w: Tensor) -> Tensor:
        """Log p(w) of the whole tensor: w `(*shape)` to a scalar `()`, nats. A subclass must define it."""
        raise NotImplementedError(f"{type(self).__name__} must define log_prob(w)")

    def log_density(self, w: Tensor) -> Tensor:
        """`log_prob(w)`, checked to be a scalar `()`.

        Raises:
            PriorError: it has another shape, whose sum with a scalar would be a divergence for each element.
        """
        log_p = self.log_prob(w)
        if log_p.shape:
            raise PriorError(
                f"{type(self).__name__}.log_prob must return a scalar, the log density of the whole tensor, got shape "
                f"{tuple(log_p.shape)}: add .sum()"
            )
        return log_p

    def stddev(self) -> "Tensor | float | None":
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

    def adopt(self, before: "Prior") -> None:
        """Learn on with the parameters of `before`, which an optimizer knows; the numbers in them come afterwards."""

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
        missing = [name for name in inspect.signature(cls).parameters if name not in settings]
        if missing and cls.settings is Prior.settings:  # which writes all, so that a default stands for none of them
            raise PriorError(f"missing a required argument: {missing[0]!r}")
        for name, value in settings.items():
            if isinstance(value, list) and not broadcasts(checked_shape(name, value), shape):
                raise PriorError(f"{name} has shape {tuple(value)}; the parameter has {tuple(shape)}")

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "Prior":
        """The inverse of `settings`: tensors hold 0.5, which all may be, until a state dict fills them."""
        values: dict[str, Any] = {n: torch.full(v, 0.5) if isinstance(v, list) else v for n, v in settings.items()}
        return cls(**values)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: object) -> None:
        for name, buffer in self._buffers.items():
            found = state_dict.get(prefix + name)
            if not isinstance(found, Tensor) or buffer is None or found.shape != buffer.shape:
                continue  # which torch reports
            dtype = torch.promote_types(found.dtype, buffer.dtype)  # settings don't tell a tensor's type
            if is_room(buffer) or dtype != buffer.dtype:
                self._buffers[name] = torch.empty(found.shape, dtype=dtype, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def keep(self, **hyperparameters: object) -> None:
        """Check that each is a finite number or tensor, and keep it under its name."""
        for name, value in hyperparameters.items():
            refuse_gradients(name, value)
            if isinstance(value, Tensor) and value.dim():
                self.register_buffer(
                    name, value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
                )
            elif isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
                raise PriorError(f"{name} must be a number or a tensor, got {value!r}")
            else:
                setattr(self, name, float(value))
            if not torch.as_tensor(getattr(self, name)).isfinite().all():
                raise PriorError(f"{name} must be finite, got {value!r}")

    def keep_positive(self, **hyperparameters: object) -> None:
        """`keep`, of what must be greater than 0."""
        self.keep(**hyperparameters)
        for name, value in hyperparameters.items():
            if not (torch.as_tensor(getattr(self, name)) > 0).all():
                raise PriorError(f"{name} must be positive, got {value!r}")

    def __repr__(self) -> str:
        defaults = {name: p.default for name, p in inspect.signature(type(self)).parameters.items()}
        shown = ", ".join(f"{k}={_short(v)}" for k, v in self.settings().items() if v != defaults[k])
        return f"{type(self).__name__}({shown})"


def _short(value: object) -> str:
    if isinstance(value, list):
        return f"tensor{tuple(value)}"
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def refuse_gradients(name: str, value: object) -> None:
    """Refuse a hyper-parameter that somebody means to learn: it would be saved as a constant.

    Raises:
        PriorError: `value` requires a gradient.
    """
    if isinstance(value, Tensor) and value.requires_grad:
        raise PriorError(
            f"{name} requires a gradient, and hyper-parameters are constants: pass {name}.detach(); the std of "
            "Gaussian priors is learned by varify.priors.Gaussian(std=..., learn_std=True), or set by varify.fit_prior"
        )


def room(shape: Any) -> Tensor:
    """Stands for a tensor of `shape` until a state dict brings it; takes no memory, however large the shape."""
    return torch.full((), 0.5).expand(shape)


def is_room(tensor: Tensor) -> bool:
    """Whether a tensor is such."""
    return tensor.numel() > 1 and not any(tensor.stride())


def checked_shape(name: str, value: object) -> torch.Size:
    """The shape that a checkpoint gives for the tensor `name`.

    Raises:
        PriorError: it is none.
    """
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**40 for n in value):
        raise PriorError(f"{name} must be the shape of a tensor, got {str(value)[:99]}")
    return torch.Size(value)


def broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    """Whether a tensor of `shape` can stand for one of `target`."""
    try:
        return bool(torch.broadcast_shapes(shape, target) == target)
    except RuntimeError:
        return False
