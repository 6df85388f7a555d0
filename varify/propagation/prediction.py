"""What mean and variance of each output say: classes' probabilities, entropies, intervals."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from varify.errors import ArgumentError, one_of
from varify.prediction.classes import OUTPUTS
from varify.prediction.noise import Likelihood
from varify.prediction.prediction import Prediction, Variances

# Of the quasi-random sequence that the measures on classes are averages over.
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
        """Standard deviation, `(*batch, ...)`."""
        return self.variance.sqrt()

    def quantile(self, q: float) -> Tensor:
        """Quantile of each output, `(*batch, ...)`.

        Raises:
            ArgumentError: q outside (0, 1).
        """
        if not 0 < q < 1:
            raise ArgumentError(f"q must lie within (0, 1), got {q}")
        z: Tensor = torch.special.ndtri(torch.tensor(q, dtype=torch.float64)).to(self.mean)
        return self.mean + z * self.std

    def interval(self, level: float = 0.95, likelihood: Likelihood | None = None) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the central interval of probability `level`, each `(*batch, ...)`.

        Args:
            level: within (0, 1).
            likelihood: the noise of a regression. With it, the interval is for a new target; without, for the
                network's output.

        Raises:
            ArgumentError: level outside (0, 1).
        """
        if not 0 < level < 1:
            raise ArgumentError(f"level must lie within (0, 1), got {level}")
        if likelihood is not None:
            return self.draws().interval(level, likelihood)
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def variances(self, likelihood: Likelihood) -> Variances:
        """Variance of a new target: that of the mean over the weights, and the mean of the noise's."""
        return self.draws().variances(likelihood)

    def draws(self, n_points: int = POINTS) -> Prediction:
        """Points that are distributed as these Gaussians, as if they were draws: always the same, and evenly spread.

        Of a Sobol sequence in the dimension of the classes, through the inverse normal distribution function. All
        data have the same points, which quantities of one output each don't notice.
        """
        dim = self.class_dim if self.outputs != "binary_logits" and self.mean.dim() else None
        size = 1 if dim is None else self.mean.shape[dim]
        engine = torch.quasirandom.SobolEngine(min(size, torch.quasirandom.SobolEngine.MAXDIM), scramble=True, seed=0)
        uniform = engine.draw(n_points, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
        eps = torch.special.ndtri(uniform).to(self.mean)
        if size > eps.shape[1]:
            raise ArgumentError(
                f"a quasi-random sequence has at most {eps.shape[1]} dimensions, the classes are {size}"
            )
        shape = [1] * self.mean.dim()
        if dim is not None:
            shape[dim] = size
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
