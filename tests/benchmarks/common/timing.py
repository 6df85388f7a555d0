"""Steps timed in turns, and the record of a run."""

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.records import machine

RESULTS = Path(__file__).parents[1] / "results"
WARM_UP = 2


def in_turns(
    steps: Mapping[str, Callable[[], object]], seconds: float, most: int = 40, least: int = 3
) -> dict[str, list[float]]:
    """Seconds of each step, all of which take turns, so that a change of the machine's speed meets all alike.

    Args:
        steps: by name. Those of a name are called first `WARM_UP` times without a clock.
        seconds: for all of them together.
        most: rounds, as is `least`.
        least: likewise, whatever the time.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    gc.collect()
    end = time.perf_counter() + seconds
    for i in range(most):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
        if i + 1 >= least and time.perf_counter() > end:
            break
    return times


def ratios(times: Mapping[str, list[float]], to: str = "plain") -> dict[str, float]:
    """The median over rounds of each one's time relative to that of `to` in the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(each, times[to], strict=True)) for name, each in times.items()
    }


def write(path: Path, device: torch.device, table: object, part: str = "") -> None:
    """A table as JSON, with the machine and the date.

    Args:
        path: of the file; it is made, or keeps its other parts.
        device: of the run.
        table: the figures.
        part: the key to put it under; by default it is the file's own table.
    """
    found: dict[str, Any] = {"machine": machine(device), "table": table}
    before = json.loads(path.read_text()) if path.exists() else {}
    found = before | {part: found} if part else before | found
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {path}")


def synchronized(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The step, and on a GPU until it is done."""
    if device.type != "cuda":
        return step

    def done() -> None:
        step()
        torch.cuda.synchronize(device)

    return done
