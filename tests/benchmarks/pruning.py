"""Accuracy against the share of weights pruned by signal to noise.

    python -m tests.benchmarks.pruning

The variational LeNet of `varify train`, at its default settings.
"""

from pathlib import Path

import torch

import varify
from varify.experiments.data import digits
from varify.experiments.settings import Settings
from varify.experiments.training import Training


def main() -> None:
    images = digits(Path())
    training = Training(Settings(networks="variational"), images)
    while training.epoch < training.settings.epochs:
        training.train_epoch(lambda figures: None)
    assert training.variational is not None

    def accuracy(vnet: varify.VariationalModule) -> float:
        with torch.no_grad():
            return float((vnet.eval()(images.test).argmax(1) == images.test_labels).float().mean())

    fractions = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98)
    for share, figure in varify.pruning_curve(training.variational, accuracy, fractions):
        print(f"{share:6.2f} pruned: accuracy {figure:.4f}")


if __name__ == "__main__":
    main()
