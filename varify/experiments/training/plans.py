"""How the learning rates go over the epochs."""

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from varify.experiments.settings import Settings

PATIENCE = 6  # epochs, as in PyTorch-BayesianCNN


class Plan:
    """The rates of one optimizer."""

    def __init__(self, optimizer: Optimizer, settings: Settings) -> None:
        self._epochs = settings.epochs
        self._factor: Callable[[int], float] = self._cosine if settings.lr_plan == "cosine" else lambda epoch: 1.0
        self._schedule: LRScheduler | ReduceLROnPlateau
        if settings.lr_plan == "plateau":
            self._schedule = ReduceLROnPlateau(optimizer, patience=PATIENCE)
        else:
            self._schedule = LambdaLR(optimizer, self._factor)

    def _cosine(self, epoch: int) -> float:
        # not to 0: the last steps are to have an effect
        return 0.5 * (1 + math.cos(math.pi * min(epoch / self._epochs, 1.0))) + 1e-3

    def step(self, nll: float) -> None:
        """An epoch is over, with this NLL on the validation images, or on the training images without these."""
        if isinstance(self._schedule, ReduceLROnPlateau):
            self._schedule.step(nll)
        else:
            self._schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self._schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state; the rates are this plan's, which may have more epochs than the saved one."""
        self._schedule.load_state_dict(state)
        if isinstance(self._schedule, LambdaLR):
            for group, rate in zip(self._schedule.optimizer.param_groups, self._schedule.base_lrs, strict=True):
                group["lr"] = rate * self._factor(self._schedule.last_epoch)
