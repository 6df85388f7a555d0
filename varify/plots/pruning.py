"""How much can go."""

from collections.abc import Sequence

from varify.errors import ArgumentError
from varify.plots.axes import BLUE, Axis, axis


def pruning_curve(
    curve: Sequence[tuple[float, float]],
    *,
    ylabel: str = "accuracy",
    label: str | None = None,
    color: str = BLUE,
    ax: Axis | None = None,
) -> Axis:
    """A figure of merit against the share of weights pruned.

    Args:
        curve: pairs of the share and the figure, of `varify.pruning_curve`.
        ylabel: what the figure is.
        label: of the curve, in the legend.
        color: of the curve.
        ax: a matplotlib axis; default: that of a new figure.

    Returns:
        The axis.

    Raises:
        ArgumentError: the curve is empty, or no pairs.
        ImportError: matplotlib is not installed.
    """
    pairs = list(curve)
    if not pairs or any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in pairs):
        raise ArgumentError("curve must be pairs of a share and a figure, as varify.pruning_curve returns")
    ax = axis(ax)
    shares, figures = zip(*pairs, strict=True)
    ax.plot([100 * share for share in shares], figures, "o-", color=color, label=label)
    ax.set(xlabel="weights pruned (%)", ylabel=ylabel)
    if label is not None:
        ax.legend(fontsize="small")
    return ax
