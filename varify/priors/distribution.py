"""Any factorized torch distribution as a prior."""

import copy
import inspect
import re
from numbers import Real
from typing import Any

import torch
from torch import Tensor, distributions

from varify.errors import PriorError, listed
from varify.priors.registry import register
from varify.weights.kl import estimated_kl, register_kl
from varify.weights.posterior import GaussianPosterior
from varify.weights.prior import Prior, broadcasts, checked_shape, refuse_gradients, room

LONG_NUMBER = re.compile(r"\d+\.\d{4,}(e-?\d+)?")  # 0.1 in single precision is 0.10000000149011612


@register("distribution")
class Factorized(Prior):
    """Any `torch.distributions.Distribution` over single weights, independent.

    Its class must be one of torch's own and be made of numbers, tensors and other such distributions, so that it can
    be moved and saved; write a `Prior` for anything else.

    Args:
        distribution: of scalars (no event dimensions), with all real numbers as support and a batch shape that
            broadcasts to the parameter.
        n_mc_samples: draws in the estimate of the KL, where `torch.distributions` knows no closed form.
    """

    def __init__(self, distribution: Any, n_mc_samples: int = 1) -> None:
        super().__init__(n_mc_samples)
        if isinstance(distribution, distributions.Distribution):
            self.description = self._describe(distribution, "")
            _check_scalar_and_real(distribution)
        else:  # the description out of a checkpoint
            self.description = distribution
            self._make_room(distribution, "")

    @property
    def distribution(self) -> distributions.Distribution:
        """The distribution, beside the parameter."""
        return self._build(self.description, "")

    def log_prob(self, w: Tensor) -> Tensor:  # noqa: D102
        return self.distribution.log_prob(w).expand_as(w).sum()

    def stddev(self) -> Tensor | None:  # noqa: D102
        try:
            std = self.distribution.stddev
        except NotImplementedError:
            return None
        return std if bool(std.isfinite().all()) else None

    def settings(self) -> dict[str, Any]:  # noqa: D102
        return {"distribution": self.description, "n_mc_samples": self.n_mc_samples}

    @classmethod
    def check_settings(cls, settings: dict[str, Any], shape: torch.Size) -> None:  # noqa: D102
        if set(settings) != {"distribution", "n_mc_samples"}:
            raise PriorError(f"it has the settings {listed(settings)}, not distribution and n_mc_samples")
        description = settings["distribution"]
        batch_shape = _described_shape("distribution", description)
        if _small(description).event_shape:
            raise PriorError(f"{description['class']} is of vectors; a prior is a distribution of single weights")
        if not broadcasts(batch_shape, shape):
            raise PriorError(f"the distribution has batch shape {tuple(batch_shape)}; the parameter has {tuple(shape)}")

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "Prior":  # noqa: D102
        return cls(**settings)

    def for_parameter(self, w: Tensor, fan_in: int) -> "Prior":  # noqa: D102
        batch_shape = self.distribution.batch_shape
        if not broadcasts(batch_shape, w.shape):
            raise PriorError(
                f"the distribution has batch shape {tuple(batch_shape)}; the parameter has {tuple(w.shape)}"
            )
        return copy.deepcopy(self).to(w.device)

    def at(self, chosen: Tensor) -> "Prior":  # noqa: D102
        if not self.distribution.batch_shape:
            return self
        if any(isinstance(value, dict) for value in self.description.values()):
            # a mixture's tensors have dimensions of their own, for its components
            return _Picked(self, chosen)
        return super().at(chosen)

    def __repr__(self) -> str:
        text = " ".join(repr(self.distribution).split())  # a mixture's is of several lines
        return f"Factorized({LONG_NUMBER.sub(lambda found: f'{float(found[0]):.4g}', text)})"

    def _describe(self, distribution: distributions.Distribution, prefix: str) -> dict[str, Any]:
        name = type(distribution).__name__
        if getattr(distributions, name, None) is not type(distribution):
            raise PriorError(
                f"{name} is no class of torch.distributions: write a varify.priors.Prior with its log_prob"
            )
        description: dict[str, Any] = {"class": name}
        for argument in list(inspect.signature(type(distribution)).parameters):
            value = getattr(distribution, argument, None)
            if argument in ("validate_args", "logits") or value is None:
                continue
            if isinstance(value, distributions.Distribution):
                description[argument] = self._describe(value, f"{prefix}{argument}_")
            elif isinstance(value, (Real, Tensor)):
                refuse_gradients(argument, value)
                tensor = torch.as_tensor(value, dtype=torch.get_default_dtype()) if isinstance(value, Real) else value
                self.register_buffer(prefix + argument, tensor.detach().clone())
                description[argument] = list(tensor.shape)
            else:
                raise PriorError(f"{name} has {argument} of type {type(value).__name__}: write a varify.priors.Prior")
        return description

    def _make_room(self, description: dict[str, Any], prefix: str) -> None:
        for argument, value in description.items():
            if isinstance(value, dict):
                self._make_room(value, f"{prefix}{argument}_")
            elif isinstance(value, list):
                self.register_buffer(prefix + argument, room(value))

    def _build(self, description: dict[str, Any], prefix: str) -> distributions.Distribution:
        arguments = {
            name: self._build(value, f"{prefix}{name}_") if isinstance(value, dict) else getattr(self, prefix + name)
            for name, value in description.items()
            if name != "class"
        }
        built: distributions.Distribution = getattr(distributions, description["class"])(**arguments)
        return built


def _described_shape(name: str, description: Any) -> torch.Size:
    """The batch shape of the distribution that a checkpoint describes; makes no tensor.

    Raises:
        PriorError: it describes none.
    """
    told = description.get("class") if isinstance(description, dict) else None
    kind = getattr(distributions, told, None) if isinstance(told, str) else None
    if not isinstance(kind, type) or not issubclass(kind, distributions.Distribution):
        raise PriorError(
            f"{name} must be a class of torch.distributions and its arguments, got {str(description)[:99]}"
        )
    arguments = {argument: value for argument, value in description.items() if argument != "class"}
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        raise PriorError(f"{name}, of class {told}: {error}") from None
    shapes = {}
    for argument, value in arguments.items():
        full = f"{name}.{argument}"
        if isinstance(value, dict):
            shapes[argument] = _described_shape(full, value)
        else:
            whole = checked_shape(full, value)
            shapes[argument] = whole[: len(whole) - _event_dim(kind, argument)]
    if kind is distributions.MixtureSameFamily:  # its components have a dimension of the mixture's own
        shapes["component_distribution"] = shapes["component_distribution"][:-1]
    try:
        shape: torch.Size = torch.broadcast_shapes(*shapes.values())
        return shape
    except RuntimeError:
        told = ", ".join(f"{argument} {tuple(shape)}" for argument, shape in shapes.items())
        raise PriorError(f"{name}: the shapes {told} don't fit together") from None


def _small(description: dict[str, Any]) -> distributions.Distribution:
    """What a checkpoint describes, with every dimension 1."""
    arguments = {
        name: _small(value) if isinstance(value, dict) else torch.full([1] * len(value), 0.5)
        for name, value in description.items()
        if name != "class"
    }
    built: distributions.Distribution = getattr(distributions, description["class"])(**arguments, validate_args=False)
    return built


def _event_dim(kind: type[distributions.Distribution], argument: str) -> int:
    """How many dimensions of an argument are not those of the batch: 1 of a categorical's probabilities."""
    constraint = kind.arg_constraints.get(argument) if isinstance(kind.arg_constraints, dict) else None
    return 0 if constraint is None else constraint.event_dim


class _Picked(Prior):
    """Some weights of a `Factorized` prior whose parameters differ between weights."""

    def __init__(self, whole: Factorized, chosen: Tensor) -> None:
        super().__init__(whole.n_mc_samples)
        self.whole, self.chosen = whole, chosen

    def log_prob(self, w: Tensor) -> Tensor:
        # elsewhere any point will do: its density is left out
        full = torch.zeros(self.chosen.shape, dtype=w.dtype, device=w.device).masked_scatter(self.chosen, w)
        return self.whole.distribution.log_prob(full)[self.chosen].sum()


def _check_scalar_and_real(distribution: distributions.Distribution) -> None:
    if distribution.event_shape:
        raise PriorError(f"{distribution!r} is a distribution of vectors; a prior is one of single weights")
    if not _is_real_line(distribution):
        raise PriorError(
            f"{distribution!r} has a bounded or discrete support: a weight may be any real number, and where the "
            "prior has no density the divergence is infinite"
        )
    try:
        finite = distribution.log_prob(torch.tensor(0.0)).isfinite().all()
    except (ValueError, NotImplementedError) as error:
        raise PriorError(f"{distribution!r} has no density at 0: write a varify.priors.Prior") from error
    if not finite:
        raise PriorError(f"{distribution!r} has no finite log density at 0: a weight may be any real number")


def _is_real_line(distribution: distributions.Distribution) -> bool:
    support: Any = distribution.support
    while hasattr(support, "base_constraint"):  # of an Independent or a mixture
        support = support.base_constraint
    return isinstance(support, type(distributions.constraints.real))


@register_kl(GaussianPosterior, Factorized)
def _kl_factorized(q: GaussianPosterior, p: Factorized) -> Tensor:
    prior = p.distribution.expand(q.rho.shape)
    sigma, log_rest = q.floored_sigma()
    try:
        return (distributions.kl_divergence(distributions.Normal(q.mean, sigma), prior) - log_rest).sum()
    except NotImplementedError:  # torch's signal for "no rule for this pair"
        return estimated_kl(q, p)
