"""Memory that a conversion takes at its peak, in copies of the network's parameters.

    python -m tests.benchmarks.conversion_memory

The result is two copies itself, the means and the rho's.
"""

import ctypes
import gc
import subprocess
import sys
from pathlib import Path

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
    Path("/proc/self/clear_refs").write_text("5")  # the record of the peak starts anew
    held = _status("VmRSS")
    vnet = varify.variationalize(network, init=init)
    assert len(vnet.posteriors) > 0
    return (_status("VmHWM") - held) / size


def _status(what: str) -> int:
    """A figure of this process in kB; see proc(5)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1])


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
