"""The training of a run, epoch by epoch."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import varify
from varify.experiments.data import Images
from varify.experiments.data.augmentation import augmented
from varify.experiments.errors import ExperimentError, SettingsError
from varify.experiments.evaluation import nll
from varify.experiments.models import build
from varify.experiments.settings import Settings
from varify.experiments.training.learners import Figures, Learner, PlainLearner, VariationalLearner
from varify.experiments.training.recording import Recorder

VALIDATION_DRAWS = 8


class Training:
    """A network and its variational twin, or one of them: from the same weights, with the same batches.

    Attributes:
        learners: by name, "plain" and "variational".
        epoch: epochs done.
        best: by name, the epoch with the lowest NLL on the validation images, that NLL, and the state of the network
            then; empty without a validation split.
        recorder: of weights over the training, if any are to be recorded.
    """

    def __init__(self, settings: Settings, images: Images) -> None:
        self.settings, self.images, self.epoch = settings, images, 0
        self._order = torch.Generator().manual_seed(settings.seed)  # of what both see, whichever are trained
        rows = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(settings.seed))
        held_out = round(settings.validation * len(rows))
        self._validation, self._rows = rows[:held_out], rows[held_out:]
        if not len(self._rows) or (settings.validation and not held_out):
            parts = f"{len(self._rows)} images to train on and {held_out} to validate"
            raise SettingsError(f"validation {settings.validation} leaves {parts}; take another share")
        torch.manual_seed(settings.seed)
        device = images.train.device
        plain = build(settings.model, settings.activation, images).to(device)
        self.learners: dict[str, Learner] = {}
        if settings.networks != "variational":
            self.learners["plain"] = PlainLearner(plain, settings)
        if settings.networks != "plain":
            example = images.train[self._rows[: settings.batch_size]]
            self.learners["variational"] = VariationalLearner(plain, settings, example, self.num_data, self.num_batches)
        self.best: dict[str, tuple[int, float, dict[str, Any]]] = {}
        self.recorder = self._recorder()

    def _recorder(self) -> Recorder | None:
        if self.settings.record is None:
            return None
        vnet = self.variational
        if vnet is None:
            raise SettingsError("record is of a variational network; leave out networks plain")
        return Recorder(vnet, self.settings.record, self.num_batches // self.settings.record_per_epoch)

    @property
    def variational(self) -> varify.VariationalModule | None:
        """The variational network, if it is trained."""
        network = self.learners["variational"].network if "variational" in self.learners else None
        return network if isinstance(network, varify.VariationalModule) else None

    @property
    def num_data(self) -> int:
        """Number of training images, without those for validation."""
        return len(self._rows)

    @property
    def num_batches(self) -> int:
        """Steps of an epoch."""
        return len(self._split(self._rows))

    def training_set(self) -> tuple[Tensor, Tensor]:
        """Images and labels that are trained on, as they are."""
        rows = self._rows.to(self.images.train.device)
        return self.images.train[rows], self.images.train_labels[rows]

    def _split(self, rows: Tensor) -> list[Tensor]:
        parts = list(rows.split(self.settings.batch_size))
        if len(parts) > 1 and len(parts[-1]) == 1:  # batch normalization can't take one image
            parts[-2:] = [torch.cat(parts[-2:])]
        return parts

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of an epoch in a new order, augmented if they are to be."""
        order = self._rows[torch.randperm(len(self._rows), generator=self._order)]
        for rows in self._split(order):
            rows = rows.to(self.images.train.device)
            x = self.images.train[rows]
            if self.settings.augmentations:
                x = augmented(x, self.settings.augmentations, self._order)
            yield x, self.images.train_labels[rows]

    def train_epoch(self, report: Callable[[Figures], object]) -> Figures:
        """One pass over the training images; `report` gets the figures of each step.

        Returns:
            Their means, with the NLL on the validation images.

        Raises:
            ExperimentError: a loss is not finite.
        """
        for learner in self.learners.values():
            learner.network.train()
        sums: Figures = {}
        for i, (x, y) in enumerate(self.batches()):
            if self.recorder is not None:
                self.recorder.at(self.epoch * self.num_batches + i)
            figures: Figures = {}
            for learner in self.learners.values():
                figures |= learner.step(x, y)
            for name, value in figures.items():
                if not math.isfinite(value):
                    raise ExperimentError(
                        f"{name} is {value} in epoch {self.epoch + 1}: a lower --lr may help, and `varify diagnose` "
                        "says more; the run folder holds the epoch before"
                    )
                sums[name] = sums.get(name, 0.0) + value / self.num_batches
            report(figures)
        self.epoch += 1
        for learner in self.learners.values():
            learner.network.eval()
        return sums | self._end_epoch(sums)

    def _end_epoch(self, means: Figures) -> Figures:
        """Rates of the next epoch, and the NLL on the validation images by learner."""
        told: Figures = {}
        rows = self._validation.to(self.images.train.device)
        for name, learner in self.learners.items():
            found = means["plain" if name == "plain" else "nll"]
            if len(rows):
                found = nll(learner.network, self.images.train[rows], self.images.train_labels[rows], VALIDATION_DRAWS)
                told[f"{name}_validation"] = found
                if name not in self.best or found < self.best[name][1]:
                    self.best[name] = (self.epoch, found, copy.deepcopy(learner.network.state_dict()))
            learner.plan.step(found)
        return told

    def take_best(self) -> None:
        """Put the states of the best epochs into the networks; without a validation split they stay as they are."""
        for name, (_, _, state) in self.best.items():
            self.learners[name].network.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs to go on as if it had not stopped."""
        device = self.images.train.device
        return {
            "epoch": self.epoch,
            "learners": {name: learner.state_dict() for name, learner in self.learners.items()},
            "best": {name: list(found) for name, found in self.best.items()},
            "recorder": None if self.recorder is None else self.recorder.state_dict(),
            "order": self._order.get_state(),
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state."""
        for name, learner in self.learners.items():
            learner.load_state_dict(state["learners"][name])
            learner.network.eval()
        self.best = {name: (found[0], found[1], found[2]) for name, found in state["best"].items()}
        if self.recorder is not None:
            self.recorder.load_state_dict(state["recorder"])
        self.epoch = state["epoch"]
        self._order.set_state(state["order"].cpu())
        torch.set_rng_state(state["random"].cpu())
        if state["cuda"] is not None and self.images.train.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.images.train.device)
