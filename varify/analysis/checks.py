"""What a check of `diagnose` is, and all of them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from varify.analysis.evidence import Evidence


class Found(NamedTuple):
    """What a check found; see `Finding`."""

    severity: str
    message: str
    figures: Mapping[str, float] = {}


Checking = Callable[[Evidence], Found | str]


class Check(NamedTuple):
    """One illness.

    Attributes:
        name: of the check.
        needs: fields of the evidence that must be given.
        of: from evidence to what was found, or to why nothing can be.
        change: what helps.
    """

    name: str
    needs: tuple[str, ...]
    of: Checking
    change: str


CHECKS: list[Check] = []


def check(name: str, *needs: str, change: str) -> Callable[[Checking], Checking]:
    """Add a check, with what it needs and what helps."""

    def register(of: Checking) -> Checking:
        CHECKS.append(Check(name, needs, of, change))
        return of

    return register
