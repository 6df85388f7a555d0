"""What many draws of a network say together: means, spreads, and where the uncertainty comes from."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from varify.errors import ArgumentError, one_of, positive_int
from varify.prediction import classes, noise, scores
from varify.prediction.crps import crps
from varify.prediction.noise import Likelihood
from varify.prediction.scores import TensorLike


class Variances(NamedTuple):
    """Of a new target, each `(*batch, ...)`.

    Attributes:
        epistemic: variance over the draws of the mean: more data would lower it.
        aleatoric: mean over the draws of the noise's variance.
    """

    epistemic: Tensor
    aleatoric: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum, by the law of total variance."""
        return self.epistemic + self.aleatoric


@dataclass(frozen=True, eq=False)
class Prediction:
    """Outputs of `n_samples` draws of the weights on one batch.

    Measures of outputs in half precision, as under autocast, are in single precision: half has too few digits to tell
    a quantile's rank or a small difference of entropies.

    Attributes:
        samples: `(n_samples, *batch, ...)`.
        outputs: what the network returns, for the measures on classes: "logits" (log probabilities are logits as
            well), "probabilities", or "binary_logits", one logit of the second of two classes per output. A measure
            on classes refuses "probabilities" that are none, and warns of "logits" that all sum to 1.
        class_dim: the classes' dimension in one output of the network; 1 for segmentation.
        vectorized: whether the draws ran vectorized, by `torch.func.vmap`, and not sequentially.
    """

    samples: Tensor
    outputs: str = "logits"
    class_dim: int = -1
    vectorized: bool = False

    def __post_init__(self) -> None:
        one_of("outputs", self.outputs, classes.OUTPUTS)

    def __eq__(self, other: object) -> bool:
        """Whether samples and settings are the same."""
        if not isinstance(other, Prediction):
            return NotImplemented
        same = (self.outputs, self.class_dim) == (other.outputs, other.class_dim)
        return same and self.samples.device == other.samples.device and torch.equal(self.samples, other.samples)

    def __hash__(self) -> int:
        return hash((self.samples.shape, self.outputs, self.class_dim))

    def __repr__(self) -> str:
        return (
            f"Prediction({self.n_samples} samples of shape {tuple(self.samples.shape[1:])}, outputs={self.outputs!r})"
        )

    @property
    def n_samples(self) -> int:
        """Number of draws."""
        return len(self.samples)

    def to(self, *args: Any, **kwargs: Any) -> "Prediction":
        """With the samples elsewhere or of another type; arguments as of `torch.Tensor.to`."""
        return replace(self, samples=self.samples.to(*args, **kwargs))

    @property
    def _precise(self) -> Tensor:
        """The samples in at least single precision; integers, such as counts, too."""
        return self.samples.to(torch.promote_types(self.samples.dtype, torch.float32))

    @cached_property
    def mean(self) -> Tensor:
        """Mean over the draws, `(*batch, ...)`."""
        return self._precise.mean(0)

    @cached_property
    def std(self) -> Tensor:
        """Standard deviation over the draws, `(*batch, ...)`, divided by n_samples (so that a single draw has 0)."""
        return self._precise.std(0, correction=0)

    def quantile(self, q: float | Tensor) -> Tensor:
        """Quantile(s) over the draws, `(*batch, ...)`, with a leading dimension if `q` is a vector.

        Raises:
            ArgumentError: q outside [0, 1].
        """
        samples = self._precise
        requested = torch.as_tensor(q, dtype=samples.dtype, device=samples.device)
        if not ((requested >= 0) & (requested <= 1)).all():
            raise ArgumentError(f"q must lie within [0, 1], got {q}")
        # torch.quantile refuses large tensors; sorting draws and interpolating does the same for any size
        ordered = samples.sort(0).values
        position = requested * (self.n_samples - 1)
        below = position.floor().long()
        above = (below + 1).clamp_max(self.n_samples - 1)
        weight = (position - below).reshape(*requested.shape, *(1,) * (samples.dim() - 1))
        return torch.lerp(ordered[below], ordered[above], weight)

    def interval(self, level: float = 0.95, likelihood: Likelihood | None = None) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the central interval of probability `level`, each `(*batch, ...)`.

        Args:
            level: within (0, 1).
            likelihood: the noise of a regression. With it, the interval is for a new target (the quantiles of the
                mixture of the draws' distributions); without, for the network's output.

        Raises:
            ArgumentError: level outside (0, 1).
        """
        noise.check_level(level)
        ends = ((1 - level) / 2, (1 + level) / 2)
        if likelihood is None:
            low, high = self.quantile(torch.tensor(ends, dtype=torch.float64))
        else:
            low, high = (noise.quantile(likelihood, self._precise, end) for end in ends)
        return low, high

    def coverage(self, targets: TensorLike, level: float = 0.95, likelihood: Likelihood | None = None) -> Tensor:
        """Share of the targets, `(*batch, ...)`, that lie within `interval(level, likelihood)`, `()`.

        Raises:
            ArgumentError: level outside (0, 1), or targets of another shape.
        """
        low, high = self.interval(level, likelihood)
        targets = noise.check_targets(targets, low)
        return ((targets >= low) & (targets <= high)).to(low.dtype).mean()

    def variances(self, likelihood: Likelihood) -> Variances:
        """Variance of a new target, by the law of total variance (Kendall & Gal 2017, arXiv:1703.04977).

        Args:
            likelihood: such as `varify.GaussianLikelihood`: tells mean and variance of a target given an output.
        """
        mean, var = noise.moments(likelihood, self._precise)
        return Variances(mean.var(0, correction=0), var.mean(0))

    # --- classes

    def _probability_samples(self) -> Tensor:
        """`(n_samples, *batch, ..., classes)`, the class dimension last."""
        classes.check_real(self.samples)
        classes.check_outputs(self.samples, self.outputs, self.class_dim)
        return classes.probability_samples(self._precise, self.outputs, self.class_dim)

    def probabilities(self) -> Tensor:
        """Predictive probability of each class: the mean of the draws' probabilities, shaped as the network's output.

        With binary logits, `(*output, 2)`.
        """
        mean = self._probability_samples().mean(0)
        return mean if self.outputs == "binary_logits" else mean.movedim(-1, self.class_dim)

    def entropy(self) -> Tensor:
        """Entropy of the predictive probabilities, nats, the output's shape without classes: all of the uncertainty."""
        return classes.entropy(self._probability_samples().mean(0))

    def mutual_information(self) -> Tensor:
        """Of label and weights, nats: the epistemic part of the entropy (Houlsby et al. 2011, arXiv:1112.5745)."""
        p = self._probability_samples()
        return classes.entropy(p.mean(0)) - classes.entropy(p).mean(0)

    def covariances(self, normalization: str = "softmax", *, summed: bool = False) -> tuple[Tensor, Tensor]:
        r"""Epistemic and aleatoric covariance of the label's indicator, each `(*batch, ..., classes, classes)`.

        Epistemic: mean over the draws of $(\hat p - \bar p)(\hat p - \bar p)^\top$; aleatoric: mean of
        $\mathrm{diag}(\hat p) - \hat p \hat p^\top$ (Kwon et al. 2020, Computational Statistics & Data Analysis 142,
        eq. 4).

        Args:
            normalization: how outputs become probabilities: "softmax", or "normalized", softplus divided by its sum
                (Shridhar et al. 2018, arXiv:1806.05978).
            summed: over all inputs: `(classes, classes)`.

        Raises:
            ArgumentError: unknown normalization, or outputs that are no logits for "normalized".
        """
        one_of("normalization", normalization, ("softmax", "normalized"))
        if normalization == "softmax":
            p = self._probability_samples()
        elif self.outputs == "logits":
            p = F.softplus(classes.classes_last(self._precise, self.class_dim))
            p = p / p.sum(-1, keepdim=True)
        else:
            raise ArgumentError(f"normalization='normalized' is for logits; the outputs are {self.outputs}")
        epistemic, aleatoric = classes.covariances(p)
        if summed:
            return _over_inputs(epistemic), _over_inputs(aleatoric)
        return epistemic, aleatoric

    def variation_ratio(self) -> Tensor:
        """Share of the draws that do not vote for the class most voted for, within [0, 1)."""
        p = self._probability_samples()
        votes = F.one_hot(p.argmax(-1), p.shape[-1]).sum(0)
        return 1 - votes.max(-1).values / self.n_samples

    # --- against targets

    def log_prob(self, targets: TensorLike, likelihood: Likelihood | None = None) -> Tensor:
        r"""Log predictive density $\log \frac1S \sum_s p(y|x, w_s)$, nats.

        Args:
            targets: labels, whole numbers, of the outputs' shape without classes; with a likelihood, of its mean's. A
                tensor, or what `torch.as_tensor` takes, as in all scores.
            likelihood: of a regression: `varify.GaussianLikelihood` or another, as trained.

        Returns:
            Of each label, in their shape. With a likelihood, of each datum, `(batch,)`: all of its targets together.

        Raises:
            ArgumentError: targets of another shape, or labels that are no classes.
        """
        if likelihood is not None:
            return noise.log_density(likelihood, self._precise, targets)
        classes.check_real(self.samples)
        classes.check_outputs(self.samples, self.outputs, self.class_dim)
        log_p = classes.log_probability_samples(self._precise, self.outputs, self.class_dim)
        return noise.log_mean_exp(scores.log_prob_of_labels(log_p, targets))

    def nll(self, targets: TensorLike, likelihood: Likelihood | None = None) -> Tensor:
        """Negative log predictive density, mean over labels or data, nats, `()`; arguments as of `log_prob`."""
        return -self.log_prob(targets, likelihood).mean()

    def accuracy(self, labels: TensorLike) -> Tensor:
        """Share of the labels that are the class of highest predictive probability, `()`."""
        return scores.accuracy(self._probability_samples().mean(0), labels)

    def brier(self, labels: TensorLike) -> Tensor:
        """Brier score, `()`: squared error of the predictive probabilities, summed over classes (Brier 1950).

        It lies within [0, 2]; of two classes it is twice the score of one class's probability.
        """
        return scores.brier(self._probability_samples().mean(0), labels)

    def ece(self, labels: TensorLike, n_bins: int = 15) -> Tensor:
        """Expected calibration error of the top label, `()`, within [0, 1] (Guo et al. 2017, arXiv:1706.04599, eq. 3).

        Args:
            labels: whole numbers, of the outputs' shape without classes.
            n_bins: of equal width. The error grows with them where data are few.
        """
        p = self._probability_samples().mean(0)
        return scores.calibration_error(p, labels, positive_int("n_bins", n_bins))

    def crps(self, targets: TensorLike, likelihood: Likelihood | None = None) -> Tensor:
        r"""Continuous ranked probability score, mean over targets, in their units, `()`; lower is better.

        $E|Y - y| - \frac12 E|Y - Y'|$ (Gneiting & Raftery 2007, JASA 102, eq. 21) of Y as the draws have it: their
        outputs, or with a likelihood the mixture of their distributions. Of Gaussians it is exact (Grimit et al. 2006,
        QJRMS 132, eq. 5), as it is of discrete targets, but for those of thousands of likely values; of other noise it
        is the integral of the squared error of the distribution function (Matheson & Winkler 1976, eq. 5), to 1e-4.

        Raises:
            ArgumentError: targets of another shape.
        """
        return crps(likelihood, self._precise, targets).mean()


def _over_inputs(matrices: Tensor) -> Tensor:
    """Sum of `(*batch, classes, classes)` over the batch, which may have no dimensions."""
    return matrices.unsqueeze(0).flatten(0, -3).sum(0)
