"""Every architecture, and what was found: writes tests/zoo/README.md; `python -m tests.zoo [group ...]` only prints."""

import datetime
import importlib.metadata
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from tests import conftest  # noqa: F401  # what torchvision needs
from tests.zoo import GROUPS
from tests.zoo.checks import Record, examined

HEAD = """# The zoo

Random weights, small inputs. For each architecture: `varify.variationalize` converts it; with sigma = 0 its outputs,
gradients and buffers equal the original's in train and in eval mode, from the same random state; with sigma > 0 the
gradient reaches every mu and rho of a parameter that the original's reaches; the KL is finite; copies, pickles (where
the original pickles) and the state dict keep everything; `predict` gives the same draws vectorized and in a loop;
`mean_model()` is the original. With `estimator="auto"`, too, outputs, gradients and buffers are the original's at
sigma = 0, in the first training call and in the second; and the graph that the torch.fx pass makes of a recorded call,
run from the same random state, returns bitwise what the network returns. `pytest tests/test_zoo.py` asserts it,
`python -m tests.zoo` wrote this table.

"sight" is the share of the variational weights that a rule of an estimator reaches under "auto"; for the others the
last column has the reasons why they are drawn. "predict" tells whether `torch.func.vmap` can run all draws at once or
they run one by one.
"""


def main(groups: list[str]) -> None:
    """Examines every architecture of the groups, of all if there are none given, and then writes the table."""
    wanted = [(group, name) for group in groups or GROUPS for name in GROUPS[group].entries()]
    records: dict[str, list[Record]] = {group: [] for group, _ in wanted}
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for (group, _), record in zip(wanted, pool.map(examined, *zip(*wanted, strict=True)), strict=True):
            records[group].append(record)
            print(f"{group}: {record.name}: {record.seconds:.1f} s", record.failures or "", flush=True)
    if not groups:
        (Path(__file__).parent / "README.md").write_text(HEAD + "\n" + told(records))


def told(records: dict[str, list[Record]]) -> str:
    """The tables as Markdown."""
    versions = ", ".join(
        f"{p} {importlib.metadata.version(p)}" for p in ("torch", "torchvision", "timm", "transformers", "peft")
    )
    lines = [
        f"{datetime.date.today():%B %Y}, {platform.machine()}, Python {platform.python_version()}, {versions}.",
        "",
    ]
    lines += ["| group | architectures | all checks hold | predicted at once | sight, over all weights |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for group, found in records.items():
        good, at_once = sum(not r.failures for r in found), sum(r.predicts == "at once" for r in found)
        sight = sum(r.seen for r in found) / sum(r.variational for r in found)
        lines.append(f"| {group} | {len(found)} | {good} ({good / len(found):.0%}) | {at_once} | {sight:.3f} |")
    failures = [(r.name, *failure) for found in records.values() for r in found for failure in r.failures.items()]
    lines += ["", "Failures: " + ("none." if not failures else "")]
    lines += [f"- {name}: {what}: {why}" for name, what, why in failures]
    for group, found in records.items():
        lines += ["", f"## {group}", "", "| architecture | parameters | sight | predict | pickles | drawn, because |"]
        lines.append("| --- | --- | --- | --- | --- | --- |")
        for r in found:
            pickles = "yes" if r.pickles else "as the original, no"
            why = "; ".join(dict.fromkeys(r.drawn.values()))
            lines.append(f"| {r.name} | {r.parameters:,} | {r.sight:.3f} | {r.predicts} | {pickles} | {why} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
