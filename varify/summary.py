"""The table that `summary()` gives: rows from a network and its posteriors, text or HTML out."""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from varify.graph.planning import Decision
from varify.network.parameters import alias_names, first_slots
from varify.posteriors import Posteriors, cuda_devices
from varify.priors.gaussian import AT_PRIOR, is_gaussian, kl_of_each_weight
from varify.weights.posterior import GaussianPosterior

HEADER = ("parameter", "shape", "prior", "estimator", "mean sigma", "KL (nats)")


class Row(NamedTuple):
    """One parameter: `names` is its first name and its others; without sigma and kl it is deterministic.

    Of its weights that are not fixed, `free` is the number, `snr` the mean of |mu|/sigma, and `at_prior` how many have
    less than `AT_PRIOR` nats, None where the prior tells no divergence of a single weight.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    prior: str
    estimator: str
    sigma: float | None = None
    kl: float | None = None
    free: int = 0
    snr: float = 0.0
    at_prior: int | None = None

    def cells(self) -> tuple[str, ...]:
        """Text of the columns of `HEADER`."""
        name = self.names[0] + "".join(f" = {other}" for other in self.names[1:])
        shape = "×".join(map(str, self.shape)) or "scalar"
        if self.sigma is None or self.kl is None:
            return name, shape, "deterministic", self.estimator, "", ""
        # sigma and KL alike are NaN if a mu or rho is
        mark = " !NaN" if math.isnan(self.kl) or math.isnan(self.sigma) else ""
        return name, shape, self.prior, self.estimator, f"{self.sigma:.3g}", f"{self.kl:,.1f}{mark}"


@dataclass(frozen=True)
class Summary:
    """Rows by parameter. Prints, also in notebooks."""

    network: str
    rows: Sequence[Row]

    @property
    def totals(self) -> str:
        """One line: how much is variational, its KL, the share at the prior and the mean signal to noise."""
        variational = [row for row in self.rows if row.kl is not None]
        count = sum(math.prod(row.shape) for row in variational)
        everything = sum(math.prod(row.shape) for row in self.rows)
        kl = sum(row.kl for row in variational if row.kl is not None)
        line = f"{self.network}: {count:,} of {everything:,} parameters variational, KL {kl:,.1f} nats"
        known = [row for row in variational if row.at_prior is not None and row.free]
        if known:
            share = sum(row.at_prior or 0 for row in known) / sum(row.free for row in known)
            which = (
                "" if len(known) == len([row for row in variational if row.free]) else " of those with Gaussian priors"
            )
            line += f", {share:.1%}{which} at the prior"
        free = sum(row.free for row in variational)
        return f"{line}, mean |mu|/sigma {sum(row.free * row.snr for row in variational) / free:.3g}" if free else line

    def __str__(self) -> str:
        table = [HEADER, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, self.totals])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in HEADER)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row.cells()) + "</tr>" for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{html.escape(self.totals)}</p>"


def summarize(posteriors: Posteriors, decisions: Sequence[Mapping[str, Decision]]) -> Summary:
    """The table of all parameters of the network that `posteriors` are of.

    Args:
        posteriors: of the network.
        decisions: what estimators do, by parameter, in each of the calls to report.
    """
    network = posteriors.network
    aliases: dict[str, list[str]] = {}
    for name, first in alias_names(network).items():
        if name != first:
            aliases.setdefault(first, []).append(name)
    # estimated KLs draw, and reading leaves the random numbers of what follows alone
    with torch.no_grad(), torch.random.fork_rng(cuda_devices(posteriors)):
        rows = list(_rows(posteriors, decisions, aliases))
    return Summary(type(network).__name__, rows)


def _rows(
    posteriors: Posteriors, decisions: Sequence[Mapping[str, Decision]], aliases: Mapping[str, Sequence[str]]
) -> Iterator[Row]:
    settings = posteriors.settings
    for name, slot in first_slots(posteriors.network).items():
        shape, names = tuple(slot.parameter.shape), (name, *aliases.get(name, ()))
        if name in posteriors:
            q, estimator = posteriors[name], _reported(name, settings.estimators[name], decisions)
            yield Row(
                names,
                shape,
                " ".join(repr(q.prior).split()),
                estimator,
                float(q.sigma.mean()),
                float(q.kl_divergence()),
                *_of_single_weights(q.unmasked()),
            )
        else:
            yield Row(names, shape, "", settings.skipped.get(name, "not chosen"))


def _of_single_weights(q: GaussianPosterior) -> tuple[int, float, int | None]:
    """Number of weights, mean of |mu|/sigma, and how many are at the prior."""
    n = q.rho.numel()
    snr = float((q.mean.abs() / q.floored_sigma()[0]).mean()) if n else 0.0
    return n, snr, int((kl_of_each_weight(q) < AT_PRIOR).sum()) if is_gaussian(q.prior) else None


def _reported(name: str, estimator: str, decisions: Sequence[Mapping[str, Decision]]) -> str:
    """What the estimator of a parameter did, and why it was not used where it wasn't."""
    if estimator == "weights":
        return estimator
    found = [each[name] for each in decisions]
    distinct = dict.fromkeys(f"{d.estimator} ({d.why})" if d.why else d.estimator for d in found)
    return "; ".join(distinct) or f"{estimator}, from the first training call on"
