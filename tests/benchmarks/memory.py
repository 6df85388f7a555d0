"""Memory and time at scale: bytes a parameter in a training step, and a GPT-2 of 124 million weights within 8 GiB.

    python -m tests.benchmarks.memory [--device cuda] [--json PATH]

Bytes a parameter: the peak of a step with fused Adam, parameters and optimizer included, beyond what the process held
before the network was made. The networks have few activations; `--arms` and `--networks` choose. Each arm is a process
of its own. On a CPU the figure is of the process (Linux), on a GPU of torch's allocator.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import varify
from tests.benchmarks.common.memory import peak, restart_peak
from tests.benchmarks.common.steps import ESTIMATORS, plain, with_varify
from tests.benchmarks.common.timing import write
from tests.benchmarks.common.workloads import Workload, gpt2
from tests.benchmarks.records import machine

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ten matrices": lambda: nn.Sequential(*(nn.Linear(1600, 1600, bias=False) for _ in range(10))),
    "two matrices": lambda: nn.Sequential(*(nn.Linear(3600, 3600, bias=False) for _ in range(2))),
}
ARMS = ("plain", *ESTIMATORS)
STEPS, DRAWS = 3, 8


def step_bytes(network: str, arm: str, device: torch.device) -> float:
    """Peak bytes a parameter."""
    _bytes_of_a_step(lambda: nn.Linear(2, 2), "weights" if arm == "plain" else arm, device)  # what loads at first
    return _bytes_of_a_step(NETWORKS[network], arm, device)


def _bytes_of_a_step(make: Callable[[], nn.Module], arm: str, device: torch.device) -> float:
    held = _restart(device)
    model = make().to(device)
    number = sum(p.numel() for p in model.parameters())
    width = next(model.parameters()).shape[1]
    work = Workload(model, (torch.randn(2, width, device=device),), torch.zeros(2, dtype=torch.long, device=device))
    step = plain(work) if arm == "plain" else with_varify(work, arm)
    del model, work
    step()
    step()
    if device.type == "cpu":  # the conversion's and the first step's own peak is another figure
        gc.collect()
        restart_peak()
    for _ in range(STEPS):
        step()
    return (_peak(device) - held) / number


def _restart(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return restart_peak()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak()


def large(device: torch.device, width: int = 768, layers: int = 12, vocabulary: int = 50_257) -> dict[str, float]:
    """A GPT-2 at batch 1x128: seconds of conversion, first and later steps and draws as ratios, peak GiB."""
    held = _restart(device)
    work = gpt2(width, layers, vocabulary, 1, 128).to(device)
    number = sum(p.numel() for p in work.network.parameters())
    usual = plain(work)
    usual()
    seconds = {"a plain step": _seconds(usual, device)}
    del usual
    work.network.zero_grad(set_to_none=True)
    start = time.perf_counter()
    step = with_varify(work, "weights")
    seconds["conversion"] = time.perf_counter() - start
    seconds["first step"] = _seconds(step, device)
    seconds["later step"] = _seconds(step, device)
    del step
    vnet = varify.variationalize(work.network).eval()
    seconds["first training call"] = _seconds(lambda: vnet.train()(*work.inputs), device)
    seconds[f"{DRAWS} draws"] = _seconds(lambda: _predict(vnet, work.inputs), device)
    ratios = {name: value / seconds["a plain step"] for name, value in seconds.items()}
    return {
        "million weights": number / 1e6,
        "seconds of a plain step": seconds["a plain step"],
        **{name: ratio for name, ratio in ratios.items() if name != "a plain step"},
        "peak GiB": (_peak(device) - held) / 2**30,
    }


def _predict(vnet: Any, inputs: tuple[Tensor, ...]) -> None:
    vnet.predict(*inputs, n_samples=DRAWS)


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def in_a_process(*arguments: str) -> Any:
    """What this module prints with these arguments."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", *arguments]
    # every tensor a mapping of its own, which is given back at once: else holes of the heap would count
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--without-gpt2", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--one", nargs="+", default=None, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.one:
        print(json.dumps(large(device) if options.one == ["gpt2"] else step_bytes(*options.one, device)))
        return
    print(machine(device))
    table: dict[str, Any] = {"bytes a parameter in a step": {}}
    for network in options.networks:
        found = {arm: in_a_process("--device", options.device, "--one", network, arm) for arm in options.arms}
        table["bytes a parameter in a step"][network] = found
        print(f"{network:14} " + "  ".join(f"{arm} {value:.1f}" for arm, value in found.items()), flush=True)
    if not options.without_gpt2:
        table["gpt2"] = in_a_process("--device", options.device, "--one", "gpt2")
        print("gpt2, times in plain steps: " + "  ".join(f"{k} {v:.2f}" for k, v in table["gpt2"].items()))
    if options.json:
        write(options.json, device, table)


if __name__ == "__main__":
    main()
