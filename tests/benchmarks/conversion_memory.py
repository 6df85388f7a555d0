"""Memory that a conversion takes at its peak, in copies of the network's parameters.

    python -m tests.benchmarks.conversion_memory

The result is two copies itself, the means and the rho's.
"""

import ctypes
import gc
import resource
import subprocess
import sys

import torch
from torch import nn

import varify

MEGABYTES = 400
NETWORKS = {
    "one matrix": lambda: nn.Linear(10_000, 10_000, bias=False),
    "forty matrices": lambda: nn.Sequential(*(nn.Linear(1581, 1581) for _ in range(40))),
    "an embedding with a padding row": lambda: nn.Embedding(100_000, 1000, padding_idx=0),
}
INITS = ("relative", "moped", "normal", "zero_mean", "constant")


def copies(name: str, init: str) -> float:
    """Peak memory beyond the network itself, divided by that of its parameters, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.conversion_memory", name, init]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(told)


def _measure(name: str, init: str) -> float:
    varify.variationalize(nn.Linear(2, 2), init=init)  # what is loaded at the first time
    torch.set_num_threads(1)
    network = NETWORKS[name]()
    size = sum(p.numel() * p.element_size() for p in network.parameters()) / 1024
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # what making the network took at its peak is in the record already, so it must not be above what is held
    held = _resident()
    before = max(held, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    vnet = varify.variationalize(network, init=init)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(vnet.posteriors) > 0
    assert before < held + 0.5 * size, "making the network took more than it holds"
    return (peak - held) / size


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 1024


def main() -> None:
    """Prints a table."""
    print(f"| network ({MEGABYTES} MB) | " + " | ".join(INITS) + " |")
    print("| --- |" + " --- |" * len(INITS))
    for name in NETWORKS:
        print(f"| {name} | " + " | ".join(f"{copies(name, init):.2f}" for init in INITS) + " |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(_measure(*sys.argv[1:]))
    else:
        main()
