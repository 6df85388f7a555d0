"""What the command line refuses: one line that names the fact and the way out, and exit code 2."""

import difflib
import traceback
from collections.abc import Iterable

INSTALL = 'pip install "torch-varify[{}]"'  # with the name of the extra


class ExperimentError(Exception):
    """What was asked for can't be done; the message is one line that says what to do."""


class SettingsError(ExperimentError):
    """A setting can't be."""


class DataError(ExperimentError):
    """A data set can't be had."""


class RunError(ExperimentError):
    """A run folder can't be read or written."""


class UsersError(ExperimentError):
    """The user's own code raised; `traceback` is what it would have shown, from the user's first line on."""

    def __init__(self, message: str, error: BaseException) -> None:
        super().__init__(message)
        entry = error.__traceback__
        while entry is not None and __package__ in str(entry.tb_frame.f_globals.get("__name__", "")):
            entry = entry.tb_next
        self.traceback = "".join(traceback.format_exception(type(error), error, entry))


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'epochs'?`, or nothing where no known word is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
