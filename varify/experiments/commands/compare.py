"""`varify compare`: the figures of several runs side by side."""

import argparse
from pathlib import Path
from typing import NamedTuple

from varify.experiments.commands.evaluate import TITLES
from varify.experiments.errors import RunError
from varify.experiments.pictures import COLORS, grid, png
from varify.experiments.runs import Run, write_whole

HELP = "compare finished runs: a table and a picture"
EXAMPLES = "example:\n  varify compare runs/a runs/b --out comparison.png\n"
COLUMNS = TITLES | {"seconds": "seconds"}


class Row(NamedTuple):
    """A network of a run: what it is called, and its figures by name."""

    run: str
    network: str
    data: str
    figures: dict[str, float]

    @property
    def name(self) -> str:
        """In the picture."""
        return f"{self.run}\n{self.network}"


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, of `varify train`")
    parser.add_argument("--out", type=Path, metavar="PNG", help="the picture (default: none)")


def do(options: argparse.Namespace) -> int:
    """Print the table, write the picture."""
    rows = [row for folder in options.runs for row in rows_of(folder)]
    print(table(rows))
    if len({row.data for row in rows}) > 1:
        print("The data differ, and so may what is possible on them.")
    if options.out is not None:
        print(f"wrote {write_whole(options.out, _picture(rows))}")
    return 0


def rows_of(folder: Path) -> list[Row]:
    """One for each network.

    Raises:
        RunError: the folder is no run, or one that has not ended.
    """
    report = Run(folder).report()
    try:
        settings = report["settings"]
        data = f"{settings['data']}/{settings['ood']}"
        return [
            Row(folder.name, name, data, figures | {"seconds": report["seconds"][name]})
            for name, figures in report["metrics"].items()
        ]
    except (KeyError, TypeError) as error:
        raise RunError(f"{folder / 'metrics.json'} is of another version: it lacks {error}; train it again") from error


def table(rows: list[Row]) -> str:
    """The best of each column has a star, where there are several networks on the same data."""
    header = ["run", "network", "data/OOD", *COLUMNS.values()]
    same = len(rows) > 1 and len({row.data for row in rows}) == 1
    lines = [header]
    for row in rows:
        cells = []
        for key in COLUMNS:
            value, others = row.figures[key], [r.figures[key] for r in rows]
            best = max(others) if key in ("accuracy", "ood_auroc") else min(others)
            text = f"{value:.1f}" if key == "seconds" else f"{value:.4f}"
            cells.append(text + ("*" if same and value == best else " "))
        lines.append([row.run, row.network, row.data, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pad = [str.ljust] * 3 + [str.rjust] * len(COLUMNS)
    return "\n".join(
        "  ".join(p(cell, w) for p, cell, w in zip(pad, line, widths, strict=True)).rstrip() for line in lines
    )


def _picture(rows: list[Row]) -> bytes:
    figure, axes = grid(2, 3)
    for ax, (key, title) in zip(axes.flat, COLUMNS.items(), strict=True):
        colors = [COLORS[row.network] for row in rows]
        ax.barh([row.name for row in rows], [row.figures[key] for row in rows], color=colors)
        if key in ("accuracy", "ood_auroc"):  # of which the differences are near 1
            ax.set_xlim(max(min(row.figures[key] for row in rows) - 0.05, 0), 1)
        ax.set(title=title)
        ax.invert_yaxis()
    return png(figure)
