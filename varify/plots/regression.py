"""What a regression knows, along one input."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from varify.errors import ArgumentError
from varify.plots.axes import BLUE, ORANGE, Axis, axis
from varify.prediction.noise import Likelihood
from varify.prediction.prediction import Prediction


@torch.no_grad()
def intervals(
    x: Tensor,
    prediction: Prediction,
    targets: Tensor | None = None,
    *,
    level: float = 0.9,
    likelihood: Likelihood | None = None,
    ax: Axis | None = None,
) -> Axis:
    """Mean and central interval of a regression with one target, along one input.

    Args:
        x: `(n,)` or `(n, 1)`, in any order.
        prediction: of `vnet.predict` on these, one target each.
        targets: `(n,)` or `(n, 1)`, drawn as points; those outside of the outermost interval in another color.
        level: of the intervals, within (0, 1).
        likelihood: the noise. With it there are two bands: that of the mean, which more data would narrow, and that of
            a new target.
        ax: a matplotlib axis; default: that of a new figure.

    Returns:
        The axis.

    Raises:
        ArgumentError: there is more than one input or target a datum, or their numbers differ.
        ImportError: matplotlib is not installed.
    """
    where = _column("x", x)
    order = where.argsort()
    # an output may be a mean and a rho, or the logarithm of a rate
    means = prediction if likelihood is None else Prediction(likelihood.moments(prediction.samples)[0])
    bands = [("of the mean", means.interval(level))]
    if likelihood is not None:
        bands.append(("of a new target", prediction.interval(level, likelihood)))
    middle = _column("the prediction", means.mean, len(where))
    ends = [(name, [_column("the prediction", end, len(where)) for end in pair]) for name, pair in reversed(bands)]
    values = None if targets is None else _column("targets", targets, len(where))
    ax = axis(ax)
    for (name, (low, high)), alpha in zip(ends, (0.2, 0.35), strict=False):
        ax.fill_between(
            where[order], low[order], high[order], color=BLUE, alpha=alpha, linewidth=0, label=f"{level:.0%} {name}"
        )
    ax.plot(where[order], middle[order], color=BLUE, label="mean")
    if values is not None:
        low, high = ends[0][1]
        out = (values < low) | (values > high)
        ax.plot(where[~out], values[~out], ".", color="black", markersize=3)
        ax.plot(where[out], values[out], ".", color=ORANGE, markersize=4, label=f"outside: {out.mean():.1%}")
    ax.legend(fontsize="small")
    return ax


def _column(name: str, values: Tensor, n: int | None = None) -> NDArray[np.float64]:
    """`(n,)`, of one number for each datum."""
    values = torch.as_tensor(values).detach().cpu().double()
    if values.dim() == 0 or values.numel() != len(values) or (n is not None and len(values) != n):
        wanted = "(n,) or (n, 1)" if n is None else f"({n},) or ({n}, 1)"
        raise ArgumentError(f"{name} must have shape {wanted}, one number for each datum, got {tuple(values.shape)}")
    column: NDArray[np.float64] = values.reshape(-1).numpy()
    return column
