"""`varify uncertainty`: epistemic and aleatoric uncertainty on a run's own images and on others."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from torch import Tensor

from varify import plots
from varify.experiments.errors import SettingsError
from varify.experiments.opened import Opened, device_of, open_run
from varify.experiments.options import add_run
from varify.experiments.pictures import grid, histogram, png
from varify.experiments.uncertainty import NORMALIZATIONS, Uncertainty, compared, uncertainty_of

HELP = "compare epistemic and aleatoric uncertainty on a run's own images and on others"
EXAMPLES = """examples:
  varify uncertainty runs/a
  varify uncertainty runs/mnist --ood fashion-mnist --data-root data
  varify uncertainty runs/mnist --ood folder/of/notMNIST --inputs 3 --batch 500
"""


LEAST = 1e-6  # of the largest bar: smaller ones are not to stretch the axis


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_run(parser)
    parser.add_argument(
        "--ood", metavar="NAME|DIR", help="letters, a data set, a folder of images or of idx files (default: the run's)"
    )
    parser.add_argument("--inputs", type=int, default=1, metavar="N", help="single inputs of each to show (default: 1)")
    parser.add_argument(
        "--batch", type=int, default=1000, metavar="N", help="inputs of each to average (default: 1000)"
    )


def do(options: argparse.Namespace) -> int:
    """Print a table, write a picture and a JSON file into the run folder."""
    for name in ("inputs", "batch"):
        if getattr(options, name) < 1:
            raise SettingsError(f"{name} must be at least 1, not {getattr(options, name)}")
    opened = open_run(options.run, device_of(options.device), data_root=options.data_root, n_samples=options.n_samples)
    vnet, settings = opened.variational, opened.settings
    seed = settings.seed if options.seed is None else options.seed
    name = options.ood or settings.ood
    short, other = Path(name).name, opened.other(name)
    sets = {"held-out images": opened.images.test[: options.batch], short: other[: options.batch]}
    found = {
        title: uncertainty_of(vnet, x, settings.n_samples, seed, None if options.quiet else title)
        for title, x in sets.items()
    }
    rows = compared(*found.values())
    print(f"{'':24}{'held-out images':>17}{short[:16]:>17}{'AUROC':>8}")
    for title, row in rows.items():
        print(f"{title:24}{row['inside']:17.5f}{row['outside']:17.5f}{row['auroc']:8.3f}")
    part = f"uncertainty-{short}"
    opened.run.write_json(f"{part}.json", {"ood": name, "n_samples": settings.n_samples, "seed": seed, "scores": rows})
    opened.run.write(f"{part}.png", _picture(opened, sets, found, options.inputs))
    print(f"wrote {part}.json and {part}.png to {opened.run.folder}")
    return 0


def _picture(opened: Opened, sets: dict[str, Tensor], found: dict[str, Uncertainty], n: int) -> bytes:
    """Single inputs with their bars, the bars of the whole batch, and histograms over its inputs."""
    n = min([n, *(len(x) for x in sets.values())])
    figure, axes = grid(2 * n + 2 + 2, 3, height=3)
    classes = opened.images.classes
    names = classes if len(classes) <= 10 else range(len(classes))
    rows = iter(axes)
    for i in range(n):
        for title, x in sets.items():
            row = next(rows)
            _show(row[0], x[i], opened)
            row[0].set(title=f"{title}, {i + 1}")
            _bars(row[1:], found[title], slice(i, i + 1), names)
    for title, x in sets.items():
        row = next(rows)
        row[0].axis("off")
        row[0].text(0.5, 0.5, f"{title}\nmean of {len(x)}", ha="center", va="center")
        _bars(row[1:], found[title], slice(None), names)
    scores = {title: u.scores() for title, u in found.items()}
    titles = list(next(iter(scores.values())))
    for ax, score in zip([ax for row in rows for ax in row], titles, strict=True):
        histogram(ax, {title: s[score] for title, s in scores.items()}, None)
        ax.set(title=score, yscale="log")
    return png(figure)


def _show(ax: Axes, image: Tensor, opened: Opened) -> None:
    pixels = (image * opened.images.std + opened.images.mean).clamp(0, 1).cpu().numpy()
    ax.imshow(pixels[0] if len(pixels) != 3 else pixels.transpose(1, 2, 0), cmap="gray")
    ax.axis("off")


def _bars(axes: Sequence[Axes], u: Uncertainty, rows: slice, names: Sequence[object]) -> None:
    for ax, kind in zip(axes, NORMALIZATIONS, strict=True):
        parts = u.epistemic[kind][rows], u.aleatoric[kind][rows]
        plots.uncertainty(*parts, names, ax=ax)
        heights = torch.stack([part.mean(0) for part in parts])
        high = max(float(heights.max()), 1e-30)
        low = max(float(heights.min()) / 2, high * LEAST)
        ax.set(title=kind, yscale="log", ylim=(low, high * (high / low) ** 0.25))  # one is often a hundredth of another
        if low > float(heights.min()):
            ax.set_ylabel(f"variance, from {LEAST:g} of the largest")
        ax.legend(fontsize="small", ncols=2, loc="upper center")  # where no bar is
        if len(u.epistemic[kind][0]) > 10:
            ax.set_xticks([])
        elif any(len(str(name)) > 2 for name in names):
            ax.tick_params(axis="x", rotation=60)
