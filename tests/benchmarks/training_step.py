"""Time of one training step relative to the plain network's: varify and its peers, in one run.

    python -m tests.benchmarks.training_step [--workloads mlp lenet] [--device cuda] [--compile] [--json PATH]

Every parameter is variational (of torchbnn, bayesian-torch and blitz only those of their layers), the optimizer is
fused Adam, with ivon-opt's own and varify's IVON beside it. All arms of a workload take turns; the figures are medians
over rounds of the ratio to the plain network's step in the same round. Peers come with `pip install
varify[benchmarks]`; what is absent, or can't convert a network, is left out with a word. `--compile` is a table of its
own, `compiled` in the JSON, and leaves the other one there: the plain step and the objective, each as one graph of
torch.compile.
"""

import argparse
from pathlib import Path

import torch

from tests.benchmarks.common.steps import ESTIMATORS, PEERS, Step, absent, compiled_plain, plain, with_peer, with_varify
from tests.benchmarks.common.timing import in_turns, ratios, synchronized, write
from tests.benchmarks.common.workloads import WORKLOADS, workload
from tests.benchmarks.records import machine


def arms_of(name: str, device: torch.device, peers: list[str]) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps by arm, and why an arm has none."""
    arms: dict[str, Step] = {"plain": plain(workload(name, device))}
    for estimator in ESTIMATORS:
        arms[f"varify, {estimator}"] = with_varify(workload(name, device), estimator)
    arms["varify, IVON"] = with_varify(workload(name, device), "weights", "ivon")
    refused = {}
    for peer in peers:
        try:
            step = with_peer(workload(name, device), peer)
            step()
        except Exception as error:  # of any kind: peers fail in their own ways
            refused[peer] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        else:
            arms[peer] = step
    return {name: synchronized(step, device) for name, step in arms.items()}, refused


def compiled_arms(name: str, device: torch.device) -> dict[str, Step]:
    """The plain step and varify's, under torch.compile: with inductor's own random numbers, and with torch's."""
    arms = {"plain": compiled_plain(workload(name, device))}
    for arm, options in {"varify, weights": None, "with fallback_random": {"fallback_random": True}}.items():
        arms[arm] = with_varify(workload(name, device), "weights", compiled=True, options=options)
    return {name: synchronized(step, device) for name, step in arms.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing for a workload")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    device = torch.device(options.device)
    print(machine(device))
    peers = [peer for peer in options.peers if peer not in absent()]
    for peer in set(options.peers) - set(peers):
        print(f"{peer} is not installed and left out: pip install {PEERS[peer][1]}")
    table = {}
    for name in options.workloads:
        try:
            arms, refused = (compiled_arms(name, device), {}) if options.compile else arms_of(name, device, peers)
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        times = in_turns(arms, options.seconds)
        found = ratios(times)
        table[name] = {"ms of the plain step": sorted(times["plain"])[len(times["plain"]) // 2] * 1e3, **found}
        shown = "  ".join(f"{arm} {ratio:.2f}" for arm, ratio in found.items() if arm != "plain")
        print(f"{name:12} plain {table[name]['ms of the plain step']:7.1f} ms   {shown}", flush=True)
        for peer, why in refused.items():
            print(f"{'':12} {peer} is left out: {why}")
    if options.json:
        write(options.json, device, table, "compiled" if options.compile else "")


if __name__ == "__main__":
    main()
