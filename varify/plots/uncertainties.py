"""What of an uncertainty more data would lower."""

from collections.abc import Sequence

from torch import Tensor

from varify.errors import ArgumentError
from varify.plots.axes import BLUE, ORANGE, Axis, axis


def uncertainty(
    epistemic: Tensor, aleatoric: Tensor, names: Sequence[object] | None = None, *, ax: Axis | None = None
) -> Axis:
    """Bars of epistemic and aleatoric uncertainty side by side, such as by class.

    Args:
        epistemic: `(k,)`, such as the diagonal of a covariance of `prediction.covariances()`, or `(n, k)`, whose mean
            over the n inputs is drawn.
        aleatoric: likewise.
        names: of the k bars; default: their numbers.
        ax: a matplotlib axis; default: that of a new figure.

    Returns:
        The axis.

    Raises:
        ArgumentError: the shapes differ, or the number of names.
        ImportError: matplotlib is not installed.
    """
    if epistemic.shape != aleatoric.shape or epistemic.dim() not in (1, 2):
        raise ArgumentError(
            "epistemic and aleatoric must both be (k,) or (n, k), got "
            f"{tuple(epistemic.shape)} and {tuple(aleatoric.shape)}; of a covariance take .diagonal(dim1=-2, dim2=-1)"
        )
    heights = [t.detach().cpu().double().reshape(-1, t.shape[-1]).mean(0).tolist() for t in (epistemic, aleatoric)]
    k = len(heights[0])
    names = list(range(k)) if names is None else list(names)
    if len(names) != k:
        raise ArgumentError(f"names must be {k}, one for each bar, got {len(names)}")
    ax = axis(ax)
    for height, by, color, label in zip(heights, (-0.2, 0.2), (BLUE, ORANGE), ("epistemic", "aleatoric"), strict=True):
        ax.bar([i + by for i in range(k)], height, 0.4, color=color, label=label)
    ax.set_xticks(range(k), [str(name) for name in names])
    ax.set(ylabel="variance of the label")
    ax.legend(fontsize="small")
    return ax
