"""What a diagnosis says: findings, and the text and HTML of all of them."""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SEVERITIES = ("error", "warning", "fine")


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: of the check.
        severity: "error", what makes training or predictions wrong; "warning", what may be meant; or "fine".
        message: what was found, in words.
        figures: what that rests on, by name.
        change: what to do about it; empty if it is fine.
    """

    name: str
    severity: str
    message: str
    figures: Mapping[str, float] = field(default_factory=dict)
    change: str = ""

    def lines(self) -> Iterator[str]:
        """As text."""
        yield f"{self.severity:8} {self.name}: {self.message}"
        if self.change:
            yield f"{'':8} -> {self.change}"


@dataclass(frozen=True)
class Diagnosis(Sequence[Finding]):
    """What is wrong with a network, worst first. Prints, also in notebooks; true if anything is wrong.

    Attributes:
        network: name of its class.
        findings: what is wrong; the diagnosis is the sequence of these.
        fine: what was checked and is not.
        unchecked: by name of the check, why it was not made.
    """

    network: str
    findings: tuple[Finding, ...]
    fine: tuple[Finding, ...]
    unchecked: Mapping[str, str]

    @classmethod
    def of(cls, network: str, found: Sequence[Finding], unchecked: Mapping[str, str]) -> "Diagnosis":
        """The findings of all checks that were made, sorted."""
        wrong = sorted((f for f in found if f.severity != "fine"), key=lambda f: SEVERITIES.index(f.severity))
        return cls(network, tuple(wrong), tuple(f for f in found if f.severity == "fine"), dict(unchecked))

    def __len__(self) -> int:
        return len(self.findings)

    def __getitem__(self, index: Any) -> Any:
        return self.findings[index]

    @property
    def names(self) -> list[str]:
        """Of the checks that found something wrong."""
        return [finding.name for finding in self.findings]

    @property
    def head(self) -> str:
        """One line: how many of each."""
        n = {s: sum(f.severity == s for f in self.findings) for s in SEVERITIES}
        message = f"errors {n['error']}, warnings {n['warning']}, fine {len(self.fine)}"
        return f"{self.network}: {message}, unknown {len(self.unchecked)}"

    def __str__(self) -> str:
        lines = [line for finding in (*self.findings, *self.fine) for line in finding.lines()]
        left = [f"{'unknown':8} {name}: {why}" for name, why in self.unchecked.items()]
        return "\n".join([self.head, *lines, *left])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [(f.severity, f.name, f.message, f.change) for f in (*self.findings, *self.fine)]
        rows += [("unknown", name, why, "") for name, why in self.unchecked.items()]
        head = "".join(f"<th>{cell}</th>" for cell in ("", "check", "found", "to change"))
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        return f"<p>{html.escape(self.head)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
