"""`varify plot`: what `varify record` recorded, as distributions and as lines over the training."""

import argparse
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from numpy.typing import NDArray

from varify.experiments.errors import RunError, SettingsError, nearest
from varify.experiments.pictures import grid, png
from varify.experiments.runs import Run

HELP = "draw what `varify record` recorded: distributions and lines over the training"
EXAMPLES = """examples:
  varify plot runs/c
  varify plot runs/c --layers "conv1*" --values sigma --weights 5
"""
Array = NDArray[np.float64]
VALUES = {"mu": "means", "sigma": "standard deviations"}
SHOWN = 8  # distributions, from the first recording to the last


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, of `varify record`")
    parser.add_argument("--layers", nargs="+", metavar="GLOB", default=["*"], help="of those recorded (default: all)")
    parser.add_argument("--values", choices=[*VALUES, "both"], default="both", help="means, stds, both (default: both)")
    parser.add_argument("--weights", type=int, default=10, metavar="N", help="weights to draw as lines (default: 10)")


def do(options: argparse.Namespace) -> int:
    """Write `distributions.png` and `lines.png` into the run folder."""
    if options.weights < 1:
        raise SettingsError(f"weights must be at least 1, not {options.weights}")
    run = Run(options.run)
    recorded = _load(run)
    known = sorted({name.rpartition("/")[0] for name in recorded} - {""})
    chosen = [name for name in known if any(fnmatchcase(name, glob) for glob in options.layers)]
    if not chosen:
        hint = nearest(options.layers[0], known)
        raise SettingsError(f"layers {' '.join(options.layers)}: the run recorded {', '.join(known)}{hint}")
    values = list(VALUES) if options.values == "both" else [options.values]
    for file, draw in (("distributions.png", _distributions), ("lines.png", _lines)):
        figure, axes = grid(len(chosen), len(values), width=5)
        for row, name in zip(axes, chosen, strict=True):
            for ax, value in zip(row, values, strict=True):
                draw(ax, recorded["step"], recorded[f"{name}/{value}"], options.weights)
                ax.set(title=f"{name}: {VALUES[value]}")
        run.write(file, png(figure))
    print(f"wrote distributions.png and lines.png to {run.folder}")
    return 0


def _load(run: Run) -> dict[str, Any]:
    path = run.folder / "record.npz"
    if not path.is_file():
        run.settings()
        raise RunError(f"{run.folder} has no recording; train with: varify record GLOB")
    try:
        with np.load(BytesIO(path.read_bytes())) as file:
            return dict(file)
    except Exception as error:  # numpy and zipfile raise all sorts on damaged files
        raise RunError(f"{path} is damaged ({type(error).__name__}); train again") from error


def _distributions(ax: Axes, steps: Array, values: Array, weights: int) -> None:
    """Of all recorded weights, cumulated, at some times: later ones are brighter.

    So ten biases are as well shown as a thousand weights, and what begins at one number is an edge and hides nothing.
    """
    times = np.unique(np.linspace(0, len(steps) - 1, min(SHOWN, len(steps))).round().astype(int))
    for i, color in zip(times, colormaps["viridis"](np.linspace(0, 0.9, len(times))), strict=True):
        ax.ecdf(values[i], color=color, label=f"step {steps[i]}")
    ax.locator_params(axis="x", nbins=5)
    ax.set(ylabel="share of weights below")
    ax.legend(fontsize="x-small")


def _lines(ax: Axes, steps: Array, values: Array, weights: int) -> None:
    """Of some weights, with the mean over all recorded ones, and the range of most."""
    rows = np.unique(np.linspace(0, values.shape[1] - 1, min(weights, values.shape[1])).round().astype(int))
    ax.plot(steps, values[:, rows], lw=0.8)
    ends = np.quantile(values, (0.05, 0.95), axis=1)
    ax.fill_between(steps, *ends, color="0.5", alpha=0.2, linewidth=0, label="90 % of the weights")
    ax.plot(steps, values.mean(1), color="black", lw=2, label="mean")
    ax.set(xlabel="step")
    ax.legend(fontsize="x-small")
