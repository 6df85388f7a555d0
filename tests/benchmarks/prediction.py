"""Time of a prediction in times of as many plain forwards, in one run.

    python -m tests.benchmarks.prediction [--device cuda] [--threads N] [--seconds N] [--json [FILE]]

Ways: the default; all draws vectorized; one after another; `joint=False`; an ensemble, whose draws are kept. They and
the plain network's forwards take turns, so that a change of the machine's speed meets all of them alike; the median of
the turns' ratios is given (of processor time on one CPU thread). The last row is a Bayesian head on a plain ResNet-18,
1,000 draws, in times of one forward.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import varify
from tests import operators
from tests.benchmarks.records import machine
from varify.experiments.models import LeNet

RESULTS = Path(__file__).parent / "results" / "prediction.json"
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "vectorized": {"vectorize": True},
    "sequential": {"vectorize": False},
    "joint=False": {"joint": False},
}


class Case(NamedTuple):
    """A network with its input, and how many draws of which parameters; `forwards`, what they are compared with."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    draws: int = 32
    where: str = "*"
    forwards: int | None = None


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1200), nn.ReLU(), nn.Linear(1200, 1200), nn.ReLU(), nn.Linear(1200, 10))


def resnet() -> nn.Module:
    operators.declare()  # of a torchvision that has none of its own here
    import torchvision

    network: nn.Module = torchvision.models.resnet18(num_classes=10)
    return network


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True), 4)


CASES = [
    Case("MLP 784-1200-1200-10, batch 1", mlp, (1, 784)),
    Case("MLP 784-1200-1200-10, batch 256", mlp, (256, 784)),
    Case("LeNet, batch 1", LeNet, (1, 1, 32, 32)),
    Case("LeNet, batch 128", LeNet, (128, 1, 32, 32)),
    Case("ResNet-18 at 32x32, batch 1", resnet, (1, 3, 32, 32), 8),
    Case("ResNet-18 at 32x32, batch 16", resnet, (16, 3, 32, 32), 8),
    Case("encoder of 3.2 M, 1x64 tokens", encoder, (1, 64, 256), 8),
    Case("encoder of 3.2 M, 16x64 tokens", encoder, (16, 64, 256), 8),
    Case("ResNet-18, Bayesian head, batch 16", resnet, (16, 3, 32, 32), 1000, "fc*", 1),
]


def seconds(run: Callable[[], object], device: torch.device) -> float:
    # of this process alone, where one thread computes: what else runs there changes it less
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measured(case: Case, device: torch.device, budget: float) -> dict[str, Any]:
    """Ratios by way, of turns that take about `budget` seconds together."""
    torch.manual_seed(0)
    plain = case.build().to(device).eval()
    vnet, x = varify.variationalize(plain, where=case.where), torch.randn(case.shape, device=device)
    runs: dict[str, Callable[[], Any]] = {
        way: lambda options=options: vnet.predict(x, n_samples=case.draws, **options) for way, options in WAYS.items()
    }
    if case.forwards is not None:  # one after another they would take as many forwards as draws
        del runs["sequential"]
    ensemble = vnet.ensemble(case.draws, seed=0)
    runs["ensemble"] = lambda: ensemble.predict(x)
    forwards = case.forwards or case.draws

    @torch.no_grad()
    def plainly() -> list[Tensor]:
        return [plain(x) for _ in range(forwards)]

    how = {way: run().vectorized for way, run in runs.items()}  # the first call of each finds out what it can do
    turns: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(turns) < 3 or (len(turns) < 30 and time.perf_counter() - start < budget):
        reference = seconds(plainly, device)
        turns.append({way: seconds(run, device) / reference for way, run in runs.items()} | {"forward": reference})
    return {
        "case": case.name,
        "draws": case.draws,
        "forward_ms": round(statistics.median(turn["forward"] for turn in turns) / forwards * 1e3, 3),
        "turns": len(turns),
        "ratios": {way: round(statistics.median(turn[way] for turn in turns), 2) for way in runs},
        "vectorized": how,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20.0, help="about so many a row, but at least three turns")
    parser.add_argument("--only", default="", help="part of a row's name")
    parser.add_argument("--json", nargs="?", type=Path, const=RESULTS, help="write the table there as well")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    about = machine(device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    ways = [*WAYS, "ensemble"]
    print(f"| network | draws | forward, ms | {' | '.join(ways)} |\n| --- | --- | --- |{' --- |' * len(ways)}")
    rows = []
    for case in CASES:
        if options.only not in case.name:
            continue
        try:
            row = measured(case, device, options.seconds)
        except ImportError as error:
            print(f"| {case.name} | left out: {error} |")
            continue
        told = [f"{row['ratios'][w]}{' v' * row['vectorized'][w]}" if w in row["ratios"] else "" for w in ways]
        print(f"| {case.name} | {case.draws} | {row['forward_ms']} | {' | '.join(told)} |", flush=True)
        rows.append(row)
    print("v: vectorized")
    if options.json:
        options.json.parent.mkdir(exist_ok=True)
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
