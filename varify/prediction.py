"""What many draws of a network say together: means, spreads, and where the uncertainty comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

OUTPUTS = ("logits", "probabilities", "binary_logits")


@dataclass(frozen=True)
class Prediction:
    """Outputs of `n_samples` draws of the weights on one batch.

    Attributes:
        samples: `(n_samples, *batch, ...)`.
        outputs: what the network returns, for the measures on classes: "logits" (log probabilities are logits as
            well), "probabilities", or "binary_logits", one logit of the second of two classes per output.
        class_dim: the classes' dimension in one output of the network; 1 for segmentation.
    """

    samples: Tensor
    outputs: str = "logits"
    class_dim: int = -1

    def __post_init__(self) -> None:
        if self.outputs not in OUTPUTS:
            raise ValueError(f"outputs={self.outputs!r}: one of {', '.join(OUTPUTS)} is needed")

    @property
    def n_samples(self) -> int:
        """Number of draws."""
        return len(self.samples)

    @cached_property
    def mean(self) -> Tensor:
        """Mean over the draws, `(*batch, ...)`."""
        return self.samples.mean(0)

    @cached_property
    def std(self) -> Tensor:
        """Standard deviation over the draws, `(*batch, ...)`, divided by n_samples (so that a single draw has 0)."""
        return self.samples.std(0, correction=0)

    def quantile(self, q: float | Tensor) -> Tensor:
        """Quantile(s) over the draws, `(*batch, ...)`, with a leading dimension if `q` is a vector.

        Raises:
            ValueError: q outside [0, 1].
        """
        wanted = torch.as_tensor(q, dtype=self.samples.dtype, device=self.samples.device)
        if not ((wanted >= 0) & (wanted <= 1)).all():
            raise ValueError(f"q={q}: quantiles lie within [0, 1]")
        # torch.quantile refuses large tensors; sorting draws and interpolating does the same for any size
        ordered = self.samples.sort(0).values
        position = wanted * (self.n_samples - 1)
        below = position.floor().long()
        above = (below + 1).clamp_max(self.n_samples - 1)
        weight = (position - below).reshape(*wanted.shape, *(1,) * (self.samples.dim() - 1))
        return torch.lerp(ordered[below], ordered[above], weight)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the central interval that holds `level` of the draws, each `(*batch, ...)`.

        Raises:
            ValueError: level outside (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level}: it must lie within (0, 1)")
        low, high = self.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]))
        return low, high

    # --- classes

    def _probability_samples(self) -> Tensor:
        """`(n_samples, *batch, ..., classes)`, the class dimension last."""
        if self.outputs == "binary_logits":
            second = self.samples.sigmoid()
            return torch.stack([1 - second, second], -1)
        samples = self.samples.movedim(self._class_dim(), -1)
        return samples if self.outputs == "probabilities" else samples.softmax(-1)

    def _class_dim(self) -> int:
        return self.class_dim if self.class_dim < 0 else self.class_dim + 1

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

    def variation_ratio(self) -> Tensor:
        """Share of the draws that do not vote for the class most voted for, within [0, 1)."""
        p = self._probability_samples()
        votes = F.one_hot(p.argmax(-1), p.shape[-1]).sum(0)
        return 1 - votes.max(-1).values / self.n_samples


def gather(draws: Sequence[Any], outputs: str = "logits", class_dim: int = -1) -> Any:
    """The `Prediction` of several outputs of one network; of structured ones, leaf by leaf.

    A leaf that is no tensor is taken from the first draw.
    """
    leaves, spec = pytree.tree_flatten(draws[0])
    rows = [leaves, *(pytree.tree_leaves(draw) for draw in draws[1:])]
    gathered = [
        Prediction(torch.stack(column), outputs, class_dim) if isinstance(column[0], Tensor) else column[0]
        for column in zip(*rows, strict=True)
    ]
    return pytree.tree_unflatten(gathered, spec)


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)  # xlogy: 0·log 0 is 0
