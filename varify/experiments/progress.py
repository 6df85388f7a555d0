"""How far a long work is: a bar on a terminal, a few plain lines elsewhere, nothing with `--quiet`."""

import sys
import time
from collections.abc import Iterable, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
MOST_LINES = 20  # in a log file or a pipe


class Progress:
    """Counts steps of epochs, and shows the time left and the figures of the last step or epoch.

    Args:
        title: of the work.
        epochs: of it all.
        steps: of an epoch.
        done: epochs done before.
        quiet: show nothing.
    """

    def __init__(self, title: str, epochs: int, steps: int, done: int = 0, *, quiet: bool = False) -> None:
        self._epochs, self._done, self._first = epochs, done, done
        self._start = time.monotonic()
        self._lines = not quiet and not sys.stderr.isatty()
        bar = not quiet and sys.stderr.isatty()
        self._bar = tqdm(total=epochs * steps, initial=done * steps, desc=title, unit="step") if bar else None
        if self._lines:
            print(f"{title}: {epochs - done} epochs of {steps} steps", file=sys.stderr)

    def step(self, figures: dict[str, float]) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.set_postfix({name: short(value) for name, value in figures.items()}, refresh=False)
            self._bar.update()

    def epoch(self, figures: dict[str, float]) -> None:
        """One epoch is done; `figures` are its means."""
        self._done += 1
        every = max(-(-self._epochs // MOST_LINES), 1)
        if self._lines and (self._done % every == 0 or self._done == self._epochs):
            seconds = (time.monotonic() - self._start) / (self._done - self._first) * (self._epochs - self._done)
            told = "  ".join(f"{name} {short(value)}" for name, value in figures.items())
            print(f"epoch {self._done} of {self._epochs}: {told}  left {_clock(seconds)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """The work is over, or interrupted."""
        if self._bar is not None:
            self._bar.close()


def shown(parts: Sequence[T], title: str | None) -> Iterable[T]:
    """The parts of a work: a bar counts them on a terminal, one line elsewhere; with None for a title, nothing."""
    if title is None or len(parts) < 2:
        return parts
    if sys.stderr.isatty():
        return tqdm(parts, desc=title, leave=False)  # type: ignore[no-any-return]
    print(f"{title}: {len(parts)} batches", file=sys.stderr, flush=True)
    return parts


def short(value: float) -> str:
    """Few digits: `0.123`, `12,345`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 1 else f"{value:.3f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
