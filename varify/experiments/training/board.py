"""Losses for TensorBoard."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from varify.experiments.errors import INSTALL, SettingsError

Write = Callable[[int, dict[str, float]], None]


@contextmanager
def board(folder: Path, wanted: bool) -> Iterator[Write]:
    """What writes the figures of an epoch into the folder; nothing, unless wanted.

    Raises:
        SettingsError: tensorboard is not installed.
    """
    if not wanted:
        yield lambda epoch, figures: None
        return
    check_installed()
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:

        def write(epoch: int, figures: dict[str, float]) -> None:
            for name, value in figures.items():
                writer.add_scalar(name, value, epoch)

        yield write


def check_installed() -> None:
    """Look for tensorboard.

    Raises:
        SettingsError: it is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise SettingsError(f"--tensorboard needs tensorboard: {INSTALL.format('tensorboard')}")
