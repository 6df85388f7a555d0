"""The picture of a run: reliability, and entropy of images and letters, for both networks."""

from io import BytesIO

import numpy as np
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve

from varify.experiments.evaluation import BINS, Evaluation

COLORS = {"plain": "tab:orange", "variational": "tab:blue"}


def picture(evaluations: dict[str, Evaluation]) -> bytes:
    """A PNG."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    reliability, *histograms = figure.subplots(1, 1 + len(evaluations))
    for axes in histograms[1:]:
        axes.sharey(histograms[0])
    reliability.plot([0, 1], [0, 1], ":", color="grey", label="calibrated")
    for name, evaluation in evaluations.items():
        confidence, predicted = evaluation.probabilities.max(1)
        hit, mean = calibration_curve(predicted == evaluation.labels, confidence.clamp_max(1), n_bins=BINS)
        label = f"{name}, ECE {evaluation.metrics['ece']:.4f}"
        reliability.plot(mean, hit, "o-", color=COLORS[name], label=label)
    reliability.set(title="Reliability", xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    reliability.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize="small")
    top = max(float(np.log(e.probabilities.shape[1])) for e in evaluations.values())
    for axes, (name, evaluation) in zip(histograms, evaluations.items(), strict=True):
        for values, label, color in (
            (evaluation.entropy, "held-out images", COLORS[name]),
            (evaluation.letter_entropy, "letters A to J", "black"),
        ):
            bins = np.linspace(0, top, 25)
            axes.hist(values.numpy(), bins, density=True, histtype="step", lw=2, color=color, label=label)
        title = f"Entropy, {name}: AUROC {evaluation.metrics['letters_auroc']:.3f}"
        axes.set(title=title, xlabel="entropy of the prediction (nats)", ylabel="density", yscale="log")
        axes.legend()
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
