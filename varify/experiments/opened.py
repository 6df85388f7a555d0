"""A run opened again: its data, its networks as they were best, and images of another kind."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import varify
from varify.experiments.data import Images, load_data, load_other
from varify.experiments.errors import RunError, SettingsError
from varify.experiments.runs import Run
from varify.experiments.settings import Settings
from varify.experiments.training import Training


@dataclass(frozen=True)
class Opened:
    """A run.

    Attributes:
        run: its folder.
        settings: of it, with what the user overrides.
        training: its networks, of the best epochs where there is a validation split.
    """

    run: Run
    settings: Settings
    training: Training

    @property
    def images(self) -> Images:
        """The data set."""
        return self.training.images

    @property
    def networks(self) -> dict[str, nn.Module]:
        """By name, in eval mode."""
        return {name: learner.network for name, learner in self.training.learners.items()}

    @property
    def variational(self) -> varify.VariationalModule:
        """The variational network.

        Raises:
            RunError: the run has none.
        """
        vnet = self.training.variational
        if vnet is None:
            raise RunError(f"{self.run.folder} has no variational network: it was trained with --networks plain")
        return vnet

    def other(self, name: str) -> Tensor:
        """Images of another kind; see `load_other`."""
        return other_images(self.settings, self.images, name)


def open_run(folder: Path, device: torch.device, **overrides: Any) -> Opened:
    """Load a run's data, build its networks, and put the checkpoint into them.

    Args:
        folder: of the run.
        device: for all of it.
        overrides: settings in the place of the run's; None for its own.

    Raises:
        RunError: it can't be read.
    """
    run = Run(folder)
    settings = replace(run.settings(), **{name: value for name, value in overrides.items() if value is not None})
    state = run.load(device)
    training = Training(settings, load_images(settings, device))
    restore(training, state, run)
    training.take_best()
    return Opened(run, settings, training)


def restore(training: Training, state: dict[str, Any], run: Run) -> None:
    """Put a checkpoint into a training.

    Raises:
        RunError: it does not fit.
    """
    try:
        training.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        text = str(error).strip().splitlines()[0]
        raise RunError(f"{run.folder / 'checkpoint.pt'} does not fit settings.toml: {text}") from error


def load_images(settings: Settings, device: torch.device) -> Images:
    """The data set of the settings."""
    return load_data(settings.data, Path(settings.data_root), settings.download, settings.size).to(device)


def other_images(settings: Settings, images: Images, name: str) -> Tensor:
    """Images of another kind, on the device of the data set."""
    return load_other(name, images, Path(settings.data_root), settings.download)


def device_of(name: str | None) -> torch.device:
    """The device that is meant, tried; by default cuda where there is one.

    Raises:
        SettingsError: it can't be used.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            device = torch.device(name)
            torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        told = str(error).splitlines()[0]
        raise SettingsError(f"device {name!r} can't be used: {told}; --device cpu always can") from error
