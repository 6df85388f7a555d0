"""Is a network right as often as it says?"""

import torch
from torch import Tensor

from varify.errors import ArgumentError, positive_int
from varify.plots.axes import BLUE, GREY, Axis, axis
from varify.prediction.prediction import Prediction


def reliability(
    probabilities: Tensor | Prediction,
    labels: Tensor,
    *,
    n_bins: int = 10,
    least: int = 1,
    label: str | None = None,
    color: str = BLUE,
    ax: Axis | None = None,
) -> Axis:
    """The reliability diagram: share of right predictions against the confidence, by bins of equal width.

    A point's area grows with its share of the data, for a point of one datum says next to nothing (DeGroot & Fienberg
    1983; Guo et al. 2017, arXiv:1706.04599).

    Args:
        probabilities: `(n, classes)`, such as `prediction.probabilities()`, or the `Prediction`.
        labels: `(n,)`, of the right classes.
        n_bins: number of bins of the top class's probability.
        least: number of data that a bin must have to be shown; the axis says it.
        label: of the curve, in the legend.
        color: of the curve.
        ax: a matplotlib axis; default: that of a new figure.

    Returns:
        The axis.

    Raises:
        ArgumentError: the shapes don't fit, or probabilities are none.
        ImportError: matplotlib is not installed.
    """
    n_bins, least = positive_int("n_bins", n_bins), positive_int("least", least)
    if isinstance(probabilities, Prediction):
        probabilities = probabilities.probabilities()
    confidences, hits, shares = (part.numpy() for part in _binned(probabilities, labels, n_bins))
    shown = shares * len(labels) >= least - 0.5  # of counts that were divided
    confidences, hits, shares = confidences[shown], hits[shown], shares[shown]
    ax = axis(ax)
    if not ax.lines:
        ax.plot([0, 1], [0, 1], ":", color=GREY, label="calibrated")
    ax.plot(confidences, hits, "-", color=color, alpha=0.5, lw=1, label=label)
    ax.scatter(confidences, hits, 8 + 200 * shares, color=color, alpha=0.6, linewidths=0)
    ax.set(
        xlabel="confidence" + f" (bins of fewer than {least} data left out)" * (least > 1),
        ylabel="accuracy",
        xlim=(0, 1),
        ylim=(0, 1.02),
    )
    if label is not None:
        ax.legend(fontsize="small")
    return ax


def _binned(probabilities: Tensor, labels: Tensor, n_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean confidence, share of right predictions and share of the data of each bin that has data, each `(bins,)`."""
    p, y = probabilities.detach().cpu().double(), labels.detach().cpu()
    if p.dim() != 2 or y.shape != p.shape[:1]:
        raise ArgumentError(
            f"probabilities must be (n, classes) and labels (n,), got {tuple(p.shape)} and {tuple(y.shape)}"
        )
    if not len(p) or not ((p >= 0) & (p <= 1 + 1e-6)).all():
        raise ArgumentError("probabilities must lie within [0, 1]; take prediction.probabilities(), or softmax")
    confidence, top = p.max(1)
    bins = (confidence * n_bins).ceil().long().clamp(1, n_bins) - 1  # open below
    counts = torch.bincount(bins, minlength=n_bins)
    kept = counts > 0
    sums = [torch.zeros(n_bins, dtype=torch.float64).index_add(0, bins, v) for v in (confidence, (top == y).double())]
    return sums[0][kept] / counts[kept], sums[1][kept] / counts[kept], counts[kept] / len(p)
