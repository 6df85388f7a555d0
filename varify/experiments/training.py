"""Training a network and its variational twin, epoch by epoch, with a state that can be saved between any two."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varify
from varify.experiments.data import Images
from varify.experiments.models import MODELS
from varify.experiments.settings import Settings


class Twins:
    """A network and its variational twin: both start from the same weights and see the same batches.

    Attributes:
        epoch: epochs done.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device, self.epoch = settings, device, 0
        torch.manual_seed(settings.seed)
        self.plain: nn.Module = MODELS[settings.model]().to(device)
        self.variational = varify.variationalize(self.plain, prior=settings.make_prior())
        means: dict[str, Any] = {"params": list(self.variational.module.parameters())}
        rhos: dict[str, Any] = {"params": list(self.variational.rho.parameters()), "lr": settings.rho_lr}
        self._optimizers = [
            torch.optim.Adam(self.plain.parameters(), settings.lr),
            torch.optim.Adam([means, rhos], settings.lr),
        ]
        self._schedules = [torch.optim.lr_scheduler.LambdaLR(o, self._cosine) for o in self._optimizers]

    def _cosine(self, epoch: int) -> float:
        progress = min(epoch / self.settings.epochs, 1.0)
        return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * progress)))) + 1e-3

    def train_epoch(self, images: Images, report: Callable[[float, float], Any]) -> None:
        """One pass over the training images with both networks.

        Args:
            images: on `device`.
            report: called after every batch with the loss per image of the plain network and of the twin, nats.
        """
        self.plain.train()
        self.variational.train()
        num_data = len(images.train)
        for batch in torch.randperm(num_data).to(self.device).split(self.settings.batch_size):
            x, y = images.train[batch], images.train_labels[batch]
            plain_loss = F.cross_entropy(self.plain(x), y)
            self._step(0, plain_loss)
            kl = self.variational.prior_loss()
            loss = F.cross_entropy(self.variational(x), y) + self.settings.beta * kl / num_data
            self._step(1, loss)
            report(plain_loss.item(), loss.item())
        for schedule in self._schedules:
            schedule.step()
        self.epoch += 1
        self.plain.eval()
        self.variational.eval()

    def _step(self, which: int, loss: Tensor) -> None:
        self._optimizers[which].zero_grad()
        loss.backward()
        self._optimizers[which].step()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs to go on as if it had not stopped."""
        return {
            "epoch": self.epoch,
            "plain": self.plain.state_dict(),
            "variational": self.variational.state_dict(),
            "optimizers": [o.state_dict() for o in self._optimizers],
            "schedules": [s.state_dict() for s in self._schedules],
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state."""
        self.plain.load_state_dict(state["plain"])
        self.variational.load_state_dict(state["variational"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for schedule, saved in zip(self._schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        self.epoch = state["epoch"]
        torch.set_rng_state(state["random"])
