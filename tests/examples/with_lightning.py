"""A variational network in Lightning: digits, the divergence in the loss once, and its terms in the log."""

from typing import Any

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

import varify
from varify.integrations import VariationalLightningModule

Batch = tuple[Tensor, Tensor]


class VariationalClassifier(VariationalLightningModule):
    """Any classifier, trained by the ELBO per datum and validated by the mean of its draws."""

    def __init__(self, network: nn.Module, **options: Any) -> None:
        super().__init__(varify.variationalize(network), F.cross_entropy, lr=3e-3, rho_lr=1e-2, **options)
        self.accuracy = MulticlassAccuracy(10)

    def validation_step(self, batch: Batch, _: int) -> None:
        x, y = batch
        prediction = self.vnet.predict(x, n_samples=8)
        self.accuracy(prediction.probabilities(), y)
        self.log_dict({"accuracy": self.accuracy, "entropy": prediction.entropy().mean()})


def digits() -> tuple[TensorDataset, TensorDataset]:
    x, y = load_digits(return_X_y=True)
    whole = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
    train, test = random_split(whole, [0.75, 0.25], torch.Generator().manual_seed(0))
    return train, test


def main(epochs: int = 10, **options: object) -> tuple[lightning.Trainer, VariationalClassifier]:
    """Trains; `options` are those of `lightning.Trainer`."""
    lightning.seed_everything(0, verbose=False)
    train, test = digits()
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    module = VariationalClassifier(network, beta=0.1)
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, **options)  # type: ignore[arg-type]
    trainer.fit(module, DataLoader(train, 64, shuffle=True), DataLoader(test, 256))
    return trainer, module


if __name__ == "__main__":
    print({name: float(value) for name, value in main()[0].callback_metrics.items()})
