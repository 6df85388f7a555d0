"""Cost of a training step against the number of parameter tensors, 10 to 5,000: it is to be linear.

    python -m tests.benchmarks.scaling [--tensors 10 100 1000] [--device cuda] [--json PATH]

The network adds vectors of 64, so that the number of tensors is all that there is. Printed are microseconds a tensor
of the plain step and of varify's, first call and conversion apart; linear is where a column stays the same. The last
two are of a training forward alone: of the plain network, and of varify's where masks leave no weight random.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import varify
from tests.benchmarks.common.steps import ESTIMATORS, Step, plain, with_varify
from tests.benchmarks.common.timing import in_turns, synchronized, write
from tests.benchmarks.common.workloads import Workload
from tests.benchmarks.records import machine

TENSORS = (10, 50, 250, 1000, 5000)


class Sum(nn.Module):
    """Adds each of its vectors to the input."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.vectors = nn.ParameterList([torch.randn(64) for _ in range(tensors)])

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(batch, 64)`."""
        for vector in self.vectors:
            x = x + vector
        return x


def work(tensors: int, device: torch.device) -> Workload:
    """One of so many tensors."""
    torch.manual_seed(0)
    return Workload(Sum(tensors), (torch.randn(4, 64),), torch.randint(64, (4,))).to(device)


def measure(tensors: int, estimators: list[str], seconds: float, device: torch.device) -> dict[str, float]:
    """Microseconds a tensor, by arm."""
    steps, found = {"plain": plain(work(tensors, device))}, {}
    for estimator in estimators:
        start = time.perf_counter()
        steps[estimator] = with_varify(work(tensors, device), estimator)
        found[f"conversion, {estimator}"] = (time.perf_counter() - start) * 1e6 / tensors
        start = time.perf_counter()
        steps[estimator]()
        found[f"first step, {estimator}"] = (time.perf_counter() - start) * 1e6 / tensors
    steps |= forwards(tensors, device)
    times = in_turns({name: synchronized(step, device) for name, step in steps.items()}, seconds)
    return {name: statistics.median(each) * 1e6 / tensors for name, each in times.items()} | found


def forwards(tensors: int, device: torch.device) -> dict[str, Step]:
    """A training forward of the plain network, and of one in which no weight is random."""
    network, (x,) = work(tensors, device).network.train(), work(tensors, device).inputs
    vnet = varify.variationalize(network, estimator="weights").train()
    for name, q in vnet.posteriors.items():
        vnet.posteriors.set_mask(name, torch.ones(q.mu.shape))
    return {"forward, plain": lambda: network(x), "forward, nothing random": lambda: vnet(x)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", nargs="+", type=int, default=list(TENSORS))
    parser.add_argument("--estimators", nargs="+", default=["weights", "auto"], choices=list(ESTIMATORS))
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for a number of tensors")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    device = torch.device(options.device)
    print(machine(device))
    table = {}
    for tensors in options.tensors:
        table[tensors] = measure(tensors, options.estimators, options.seconds, device)
        shown = "  ".join(f"{name} {value:.1f}" for name, value in table[tensors].items())
        print(f"{tensors:5} tensors, us a tensor: {shown}", flush=True)
    if options.json:
        write(options.json, device, table)


if __name__ == "__main__":
    main()
