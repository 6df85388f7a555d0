"""What many draws of a network say together: means, spreads, and where the uncertainty comes from."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from varify.errors import ArgumentError, one_of


class Likelihood(Protocol):
    """What a prediction asks of a regression's likelihood; those of `varify.likelihoods` have it."""

    def moments(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of a target given the network's output."""


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


OUTPUTS = ("logits", "probabilities", "binary_logits")


@dataclass(frozen=True, eq=False)
class Prediction:
    """Outputs of `n_samples` draws of the weights on one batch.

    Measures of outputs in half precision, as under autocast, are in single precision: half has too few digits to tell
    a quantile's rank or a small difference of entropies.

    Attributes:
        samples: `(n_samples, *batch, ...)`.
        outputs: what the network returns, for the measures on classes: "logits" (log probabilities are logits as
            well), "probabilities", or "binary_logits", one logit of the second of two classes per output.
        class_dim: the classes' dimension in one output of the network; 1 for segmentation.
        vectorized: whether the draws ran vectorized, by `torch.func.vmap`, and not sequentially.
    """

    samples: Tensor
    outputs: str = "logits"
    class_dim: int = -1
    vectorized: bool = False

    def __post_init__(self) -> None:
        one_of("outputs", self.outputs, OUTPUTS)

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

    @property
    def _precise(self) -> Tensor:
        """The samples in at least single precision."""
        half = self.samples.is_floating_point() and torch.finfo(self.samples.dtype).bits < 32
        return self.samples.float() if half else self.samples

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
                mixture of the draws' Gaussians); without, for the network's output.

        Raises:
            ArgumentError: level outside (0, 1).
        """
        if not 0 < level < 1:
            raise ArgumentError(f"level must lie within (0, 1), got {level}")
        ends = ((1 - level) / 2, (1 + level) / 2)
        if likelihood is None:
            low, high = self.quantile(torch.tensor(ends, dtype=torch.float64))
        else:
            low, high = (_mixture_quantile(*self._moments(likelihood), end) for end in ends)
        return low, high

    def coverage(self, targets: Tensor, level: float = 0.95, likelihood: Likelihood | None = None) -> Tensor:
        """Share of the targets, `(*batch, ...)`, that lie within `interval(level, likelihood)`, `()`.

        Raises:
            ArgumentError: level outside (0, 1), or targets of another shape.
        """
        low, high = self.interval(level, likelihood)
        if targets.shape != low.shape:
            raise ArgumentError(f"the targets have shape {tuple(targets.shape)}, the prediction {tuple(low.shape)}")
        return ((targets >= low) & (targets <= high)).to(low.dtype).mean()

    def variances(self, likelihood: Likelihood) -> Variances:
        """Variance of a new target, by the law of total variance (Kendall & Gal 2017, arXiv:1703.04977).

        Args:
            likelihood: such as `varify.GaussianLikelihood`: tells mean and variance of a target given an output.
        """
        mean, var = self._moments(likelihood)
        return Variances(mean.var(0, correction=0), var.mean(0))

    def _moments(self, likelihood: Likelihood) -> tuple[Tensor, Tensor]:
        """Mean and variance of a target by draw, without the graph of a likelihood whose noise is learned."""
        mean, var = likelihood.moments(self._precise)
        return mean.detach(), var.detach()

    # --- classes

    def _probability_samples(self) -> Tensor:
        """`(n_samples, *batch, ..., classes)`, the class dimension last."""
        if self.outputs == "binary_logits":
            second = self._precise.sigmoid()
            return torch.stack([1 - second, second], -1)
        samples = self._precise.movedim(self._class_dim(), -1)
        return samples if self.outputs == "probabilities" else samples.softmax(-1)

    def _class_dim(self) -> int:
        """The classes' dimension in `samples`."""
        shape, dim = tuple(self.samples.shape[1:]), self.class_dim
        if len(shape) == 1 and dim < 0:
            raise ArgumentError(
                f"outputs of shape {shape} have one dimension, which is the batch's: for one logit of two classes say "
                "outputs='binary_logits'; for the classes of a single datum, class_dim=0"
            )
        if not -len(shape) <= dim < len(shape) or shape[dim] < 2:
            raise ArgumentError(
                f"outputs of shape {shape} have no two classes in dimension {dim}; "
                "for one logit of two classes say outputs='binary_logits'"
            )
        return dim if dim < 0 else dim + 1

    def probabilities(self) -> Tensor:
        """Predictive probability of each class: the mean of the draws' probabilities, shaped as the network's output.

        With binary logits, `(*output, 2)`.
        """
        mean = self._probability_samples().mean(0)
        return mean if self.outputs == "binary_logits" else mean.movedim(-1, self.class_dim)

    def entropy(self) -> Tensor:
        """Entropy of the predictive probabilities, nats, the output's shape without classes: all of the uncertainty."""
        return _entropy(self._probability_samples().mean(0))

    def mutual_information(self) -> Tensor:
        """Of label and weights, nats: the epistemic part of the entropy (Houlsby et al. 2011, arXiv:1112.5745)."""
        p = self._probability_samples()
        return _entropy(p.mean(0)) - _entropy(p).mean(0)

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
            p = F.softplus(self._precise.movedim(self._class_dim(), -1))
            p = p / p.sum(-1, keepdim=True)
        else:
            raise ArgumentError(f"normalization='normalized' is for logits; the outputs are {self.outputs}")
        away = p - p.mean(0)
        epistemic = torch.einsum("s...i,s...j->...ij", away, away) / self.n_samples
        aleatoric = p.mean(0).diag_embed() - torch.einsum("s...i,s...j->...ij", p, p) / self.n_samples
        if summed:
            return _over_inputs(epistemic), _over_inputs(aleatoric)
        return epistemic, aleatoric

    def variation_ratio(self) -> Tensor:
        """Share of the draws that do not vote for the class most voted for, within [0, 1)."""
        p = self._probability_samples()
        votes = F.one_hot(p.argmax(-1), p.shape[-1]).sum(0)
        return 1 - votes.max(-1).values / self.n_samples


def _over_inputs(matrices: Tensor) -> Tensor:
    """Sum of `(*batch, classes, classes)` over the batch, which may have no dimensions."""
    return matrices.unsqueeze(0).flatten(0, -3).sum(0)


def _mixture_quantile(mean: Tensor, var: Tensor, q: float) -> Tensor:
    """Quantile of the mixture of Gaussians over dimension 0, by bisection of its distribution function."""
    std = var.sqrt()
    # every component's own quantile bounds the mixture's
    ends = mean + std * torch.special.ndtri(torch.tensor(q, dtype=torch.float64)).to(mean)
    low, high = ends.min(0).values, ends.max(0).values
    for _ in range(60):
        middle = (low + high) / 2
        below = torch.special.ndtr((middle - mean) / std).mean(0) < q
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    quantile: Tensor = (low + high) / 2
    return quantile


def _entropy(p: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(p).sum(-1)  # −p log p, 0 at 0
    return entropy
