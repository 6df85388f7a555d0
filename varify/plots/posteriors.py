"""What the weights of a network know."""

import math
from collections.abc import Sequence

import torch

from varify.errors import ArgumentError, one_of, positive_int
from varify.module import VariationalModule
from varify.network.selection import matching
from varify.plots.axes import BLUE, GREY, ORANGE, Axis, axis
from varify.within import check_variational

GRID = 400


@torch.no_grad()
def posterior(vnet: VariationalModule, name: str, *, n_bins: int = 60, ax: Axis | None = None) -> Axis:
    """The weights of a parameter: their means as a histogram, and the density of one of them drawn.

    The density is the mixture of all its posteriors, the mean of N(w; mu, sigma²) over the weights.

    Args:
        vnet: left alone.
        name: of a parameter, such as "fc1.weight".
        n_bins: of the histogram.
        ax: a matplotlib axis; default: that of a new figure.

    Returns:
        The axis.

    Raises:
        UnknownNameError: no parameter of that name has a posterior.
        ImportError: matplotlib is not installed.
    """
    check_variational(vnet, "varify.plots.posterior")
    n_bins = positive_int("n_bins", n_bins)
    q = vnet.posteriors[name]
    mean, sigma = (t.detach().double().cpu().flatten() for t in (q.mean, q.sigma))
    if q.fixed is not None:
        free = q.fixed.cpu().flatten() == 0
        mean, sigma = mean[free], sigma[free]
    if not len(mean):
        raise ArgumentError(f"{name} has no weights that are random: all are pruned or fixed")
    ax = axis(ax)
    reach = 3 * float(sigma.median())
    low, high = float(mean.min()) - reach, float(mean.max()) + reach
    grid = torch.linspace(low, high, GRID, dtype=torch.float64)
    ax.hist(mean.numpy(), n_bins, density=True, color=BLUE, alpha=0.4, label="means")
    ax.plot(grid.numpy(), _mixture(grid, mean, sigma).numpy(), color=BLUE, label="a drawn weight")
    ax.set(title=name, xlabel="weight", ylabel="density")
    ax.legend(fontsize="small")
    return ax


def _mixture(grid: torch.Tensor, mean: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Density of the mixture of N(mean, sigma²) on the grid; in parts, for a layer may have millions of weights."""
    total = torch.zeros_like(grid)
    for mu, std in zip(mean.split(10_000), sigma.split(10_000), strict=True):
        z = (grid[:, None] - mu) / std
        total += ((-0.5 * z.square()).exp() / (std * math.sqrt(2 * math.pi))).sum(1)
    return total / len(mean)


@torch.no_grad()
def snr(
    vnet: VariationalModule,
    *,
    where: str | Sequence[str] = "*",
    unit: str = "dB",
    n_bins: int = 60,
    ax: Axis | None = None,
) -> Axis:
    """Histogram of the weights' signal to noise, with its cumulative share: what pruning would take first.

    As figure 3 of Blundell et al. 2015 (arXiv:1505.05424), 20·log₁₀(|mu|/sigma). Pruned and fixed weights are left out.
    The axis leaves out the least fiftieth if it reaches 20 dB further down, as means next to 0 do, and says so.

    Args:
        vnet: left alone.
        where: glob, or several, on parameter names.
        unit: "dB", or "log10" for log₁₀(|mu|/sigma).
        n_bins: of the histogram.
        ax: a matplotlib axis; default: that of a new figure.

    Returns:
        The axis; the share is on a twin of it.

    Raises:
        ArgumentError: no weight is random, or the unit is unknown.
        SelectionError: `where` matches nothing.
        ImportError: matplotlib is not installed.
    """
    check_variational(vnet, "varify.plots.snr")
    one_of("unit", unit, ("dB", "log10"))
    n_bins = positive_int("n_bins", n_bins)
    posteriors = dict(vnet.posteriors)
    chosen = [posteriors[name] for name in matching(posteriors, where)]
    parts = [q.snr.flatten() if q.fixed is None else q.snr[q.fixed == 0] for q in chosen]
    ratios = torch.cat([part.detach().double().cpu() for part in parts])
    values = ratios[ratios > 0].log10() * (20 if unit == "dB" else 1)
    if not len(values):
        raise ArgumentError("no weight has a signal: all are pruned, fixed or 0")
    ordered = values.sort().values
    low, cut = float(ordered[0]), float(ordered[len(ordered) // 50])
    far = cut - low > (20 if unit == "dB" else 1)
    low = cut if far else low
    ax = axis(ax)
    ax.hist(values.numpy(), n_bins, range=(low, float(ordered[-1])), density=True, color=BLUE, alpha=0.5)
    ax.set(xlabel=f"signal to noise |mu|/sigma ({unit})" + ", without the least 2 %" * far, ylabel="density")
    share = ax.twinx()
    share.plot(ordered.numpy(), torch.linspace(0, 1, len(ordered)).numpy(), color=ORANGE)
    if far:
        share.set_xlim(low, float(ordered[-1]))
    share.set(ylim=(0, 1), ylabel="share of weights below")
    share.yaxis.label.set_color(ORANGE)
    ax.axvline(0, color=GREY, linestyle=":")
    return ax
