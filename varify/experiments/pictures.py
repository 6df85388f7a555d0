"""The pictures of the commands, as PNG files."""

from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from varify import plots
from varify.experiments.evaluation import Evaluation

COLORS = {"plain": "tab:orange", "variational": "tab:blue"}


def png(figure: Figure) -> bytes:
    """The file's content."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def grid(rows: int, columns: int, width: float = 4.3, height: float = 3.6) -> tuple[Figure, Any]:
    """A figure and its axes, `(rows, columns)`."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def of_evaluations(evaluations: dict[str, Evaluation], ood: str) -> bytes:
    """Reliability, and entropy of held-out images and of others, for each network."""
    figure, axes = grid(1, 1 + len(evaluations), height=4)
    reliability, *histograms = axes[0]
    for ax in histograms[1:]:
        ax.sharey(histograms[0])
    for name, e in evaluations.items():
        label = f"{name}, ECE {e.metrics['ece']:.4f}"
        plots.reliability(e.probabilities, e.labels, label=label, color=COLORS[name], least=5, ax=reliability)
    reliability.set(title="Reliability")
    top = max(float(np.log(e.probabilities.shape[1])) for e in evaluations.values())
    for ax, (name, e) in zip(histograms, evaluations.items(), strict=True):
        histogram(ax, {"held-out images": e.entropy, ood: e.other_entropy}, top, COLORS[name])
        title = f"Entropy, {name}: AUROC {e.metrics['ood_auroc']:.3f}"
        ax.set(title=title, xlabel="entropy of the prediction (nats)", ylabel="density", yscale="log")
    return png(figure)


def histogram(ax: Axes, values: dict[str, Tensor], top: float | None, color: str = COLORS["variational"]) -> None:
    """Outlines of two histograms over the same bins, the second in black."""
    highest = max(float(v.max()) for v in values.values()) if top is None else top
    bins = np.linspace(0, max(highest, 1e-12), 25).tolist()
    for (label, v), line in zip(values.items(), (color, "black"), strict=True):
        ax.hist(np.asarray(v), bins, density=True, histtype="step", lw=2, color=line, label=label)
    ax.legend(fontsize="small")
