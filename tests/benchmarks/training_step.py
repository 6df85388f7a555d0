"""Time of one training step: the plain network, varify, and PyVarInf's algorithm, in one run.

    python -m tests.benchmarks.training_step

The network is the 784-1200-1200-10 MLP of Blundell et al. 2015 at batch 128 with Adam; the prior is Gaussian. The
algorithms take turns, so that a change of the machine's speed meets all of them alike; medians are printed.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import varify

BATCH, NUM_DATA = 128, 60_000
PEER = "PyVarInf's algorithm"


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 1200), nn.ReLU(), nn.Linear(1200, 1200), nn.ReLU(), nn.Linear(1200, 10))


class PyVarInf(nn.Module):
    """Its algorithm: log(1 + e^rho), noise refilled in place, the KL written out; weights swapped in by name."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = [network]  # its parameters are not this module's
        self.names = [name for name, _ in network.named_parameters()]
        self.stds = [1 / math.sqrt(p[0].numel()) if p.dim() > 1 else 0.01 for p in network.parameters()]
        self.mean = nn.ParameterList(p.detach().clone() for p in network.parameters())
        self.rho = nn.ParameterList(
            torch.full_like(p, math.log(math.expm1(s))) for p, s in zip(network.parameters(), self.stds, strict=True)
        )
        self.eps = [torch.zeros_like(p) for p in self.mean]

    def forward(self, x: Tensor) -> Tensor:
        weights = {}
        for name, mean, rho, eps in zip(self.names, self.mean, self.rho, self.eps, strict=True):
            eps.normal_()
            weights[name] = mean + (1 + rho.exp()).log() * eps
        return functional_call(self.network[0], weights, (x,))

    def prior_loss(self) -> Tensor:
        total: Tensor | float = 0.0
        for mean, rho, std in zip(self.mean, self.rho, self.stds, strict=True):
            sigma = (1 + rho.exp()).log()
            total = total + (-(sigma / std).log() + (sigma**2 + mean**2) / (2 * std**2) - 0.5).sum()
        return total


def step_of(network: nn.Module, device: torch.device) -> Callable[[], None]:
    network.to(device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    x, y = torch.randn(BATCH, 784, device=device), torch.randint(10, (BATCH,), device=device)

    def step() -> None:
        loss = F.cross_entropy(network(x), y)
        if hasattr(network, "prior_loss"):
            loss = loss + network.prior_loss() / NUM_DATA
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    bayesian = mlp()
    steps = {
        "plain": step_of(mlp(), device),
        PEER: step_of(PyVarInf(bayesian.to(device)), device),
        "varify": step_of(varify.variationalize(mlp()), device),
        "varify, local": step_of(varify.variationalize(mlp(), estimator="local"), device),
        "varify, flipout": step_of(varify.variationalize(mlp(), estimator="flipout"), device),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(options.repeats + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 3:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(t) for name, t in times.items()}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, {device}")
    for name, median in medians.items():
        print(f"{name:22} {median * 1e3:8.2f} ms   {median / medians[PEER]:6.3f} of PyVarInf's")


if __name__ == "__main__":
    main()
