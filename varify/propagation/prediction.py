"""What mean and variance of each output say: classes' probabilities, entropies, intervals."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from varify.errors import ArgumentError, one_of
from varify.prediction import noise
from varify.prediction.classes import OUTPUTS
from varify.prediction.noise import Likelihood, check_level
from varify.prediction.prediction import Prediction, Variances
from varify.propagation.activations import std_of

# Of the quasi-random sequence that the measures on classes, and of noise that is not added, are averages over.
POINTS = 128


@dataclass(frozen=True, eq=False)
class GaussianPrediction:
    """Mean and variance of each output, as if it were Gaussian and independent of the others.

    Attributes:
        mean: `(*batch, ...)`, the shape of the network's output.
        variance: likewise, over the posterior of the weights: epistemic.
        outputs: what the network returns, as for `Prediction`.
        class_dim: the classes' dimension in the output.
    """

    mean: Tensor
    variance: Tensor
    outputs: str = "logits"
    class_dim: int = -1

    def __post_init__(self) -> None:
        one_of("outputs", self.outputs, OUTPUTS)

    def __repr__(self) -> str:
        return f"GaussianPrediction(shape={tuple(self.mean.shape)}, outputs={self.outputs!r})"

    @cached_property
    def std(self) -> Tensor:
        """Standard deviation, `(*batch, ...)`; its gradient is 0 where the variance is."""
        return std_of(self.variance)

    def quantile(self, q: float) -> Tensor:
        """Quantile of each output, `(*batch, ...)`.

        Raises:
            ArgumentError: q outside (0, 1).
        """
        if not 0 < q < 1:
            raise ArgumentError(f"q must lie within (0, 1), got {q}")
        return self._quantile(q, self.std)

    def _quantile(self, q: float, std: Tensor) -> Tensor:
        z: Tensor = torch.special.ndtri(torch.tensor(q, dtype=torch.float64)).to(self.mean)
        return self.mean + z * std

    def interval(self, level: float = 0.95, likelihood: Likelihood | None = None) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the central interval of probability `level`, each `(*batch, ...)`.

        Args:
            level: within (0, 1).
            likelihood: the noise of a regression. With it, the interval is for a new target; without, for the
                network's output. Exact where a target is the output plus Gaussian noise; of another noise, the
                quantiles of a mixture over `POINTS` outputs.

        Raises:
            ArgumentError: level outside (0, 1).
        """
        check_level(level)
        std = self.std
        if likelihood is not None:
            draws = self._draws_by_output()
            added = None if isinstance(likelihood, noise.OtherNoise) else noise.added(likelihood, draws.samples)
            if added is None:
                return draws.interval(level, likelihood)
            std = (self.variance + added).sqrt()
        return self._quantile((1 - level) / 2, std), self._quantile((1 + level) / 2, std)

    def variances(self, likelihood: Likelihood) -> Variances:
        """Variance of a new target: that of the mean over the weights, and the mean of the noise's.

        Exact where a target is the output plus noise; else of `POINTS` outputs.
        """
        draws = self._draws_by_output()
        added = noise.added(likelihood, draws.samples)
        return draws.variances(likelihood) if added is None else Variances(self.variance, added)

    def _draws_by_output(self) -> Prediction:
        """Points of each output for itself: all outputs have the same."""
        eps = normal_points(POINTS, 1).to(self.mean).view(-1, *(1,) * self.mean.dim())
        return Prediction(self.mean + self.std * eps, self.outputs, self.class_dim)

    def draws(self, n_points: int = POINTS) -> Prediction:
        """Points that are distributed as these Gaussians, as if they were draws: always the same, and evenly spread.

        Of a Sobol sequence in the dimension of the classes, through the inverse normal distribution function; each
        output's have its mean and variance. All data have the same points, which quantities of one output each don't
        notice.

        Raises:
            ArgumentError: more classes than such a sequence has dimensions.
        """
        dim = self.class_dim if self.outputs != "binary_logits" and self.mean.dim() else None
        shape = [1] * self.mean.dim()
        if dim is not None:
            shape[dim] = self.mean.shape[dim]
        eps = normal_points(n_points, math.prod(shape)).to(self.mean)
        return Prediction(self.mean + self.std * eps.view(n_points, *shape), self.outputs, self.class_dim)

    # --- classes

    def probabilities(self) -> Tensor:
        """Predictive probability of each class, shaped as `Prediction.probabilities`: the mean over `draws()`."""
        return self.mean if self.outputs == "probabilities" else self.draws().probabilities()

    def entropy(self) -> Tensor:
        """Entropy of the predictive probabilities, nats, the output's shape without classes: all of the uncertainty."""
        if self.outputs == "probabilities":
            entropy: Tensor = torch.special.entr(self.mean).sum(self.class_dim)
            return entropy
        return self.draws().entropy()

    def mutual_information(self) -> Tensor:
        """Of label and weights, nats: the epistemic part of the entropy.

        Raises:
            ArgumentError: outputs are probabilities, whose Gaussians reach beyond 0 and 1.
        """
        if self.outputs == "probabilities":
            raise ArgumentError("mutual_information is of logits: propagate to them, not to the softmax's output")
        return self.draws().mutual_information()


def normal_points(n_points: int, dims: int) -> Tensor:
    """Quasi-random points of independent standard normals, `(n_points, dims)`; of each, mean 0 and variance 1.

    Raises:
        ArgumentError: too many dimensions.
    """
    most = torch.quasirandom.SobolEngine.MAXDIM
    if dims > most:
        raise ArgumentError(f"a quasi-random sequence has at most {most} dimensions, the classes are {dims}")
    engine = torch.quasirandom.SobolEngine(dims, scramble=True, seed=0)
    eps = torch.special.ndtri(engine.draw(n_points, dtype=torch.float64).clamp(1e-9, 1 - 1e-9))
    eps = eps - eps.mean(0)
    std = std_of(eps.square().mean(0)).clamp_min(torch.finfo(eps.dtype).tiny)  # a single point is the mean
    points: Tensor = eps / std
    return points
