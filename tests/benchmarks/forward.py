"""Time of a forward, of a training step and of a first call, for networks of few large and of many small modules.

    python -m tests.benchmarks.forward [--against CHECKOUT] [--repeats N]

With --against, the same is measured of the varify in another checkout. Each checkout has its own process; they take
turns, measurement by measurement, so that a change of the machine's speed meets both alike. Medians are printed.
"""

import argparse
import functools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import varify
from tests import operators
from varify.experiments.models import LeNet

ESTIMATORS = ("weights", "local", "flipout", "auto")
FORWARDS = ("plain", "drawn weights")
Call = Callable[[nn.Module], Tensor]


def lenet() -> tuple[nn.Module, Call]:
    x = torch.randn(128, 1, 32, 32)
    return LeNet(), lambda network: network(x)


def deep() -> tuple[nn.Module, Call]:
    x = torch.randn(32, 64)
    return nn.Sequential(*(part for _ in range(20) for part in (nn.Linear(64, 64), nn.ReLU()))), lambda net: net(x)


def bert() -> tuple[nn.Module, Call]:
    operators.declare()
    import transformers

    tokens = torch.randint(1000, (8, 64))
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    network = transformers.BertModel(transformers.BertConfig(vocab_size=1000, **sizes))
    return network, lambda net: net(input_ids=tokens).last_hidden_state


def small() -> tuple[nn.Module, Call]:
    x = torch.randn(8, 8)
    return nn.Sequential(*(part for _ in range(90) for part in (nn.Linear(8, 8), nn.ReLU()))), lambda net: net(x)


NETWORKS = {
    "LeNet, batch 128": lenet,
    "MLP of 20 layers, width 64, batch 32": deep,
    "BERT, width 128, 4 layers, 8x64 tokens": bert,
    "180 small modules, batch 8": small,
}


# --- in the process of a checkout


@functools.cache
def made(network: str) -> tuple[nn.Module, Call]:
    torch.manual_seed(0)
    return NETWORKS[network]()


@functools.cache
def converted(network: str, estimator: str) -> varify.VariationalModule:
    return varify.variationalize(made(network)[0], estimator=estimator).train()


@functools.cache
def step(network: str, estimator: str) -> Callable[[], None]:
    vnet, call = converted(network, estimator), made(network)[1]
    optimizer = torch.optim.Adam(vnet.parameters(), lr=1e-4)

    def run() -> None:
        loss = call(vnet).square().mean() + vnet.prior_loss() / 1e5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def seconds(run: Callable[[], Any], times: int = 3) -> float:
    """Median of some times, after one that isn't counted."""
    run()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def of_first_call(network: str, estimator: str) -> float:
    """Its time, in times of a later call."""
    plain, call = made(network)
    vnet = varify.variationalize(plain, estimator=estimator).train()
    start = time.perf_counter()
    call(vnet)
    first = time.perf_counter() - start
    return first / seconds(lambda: call(vnet))


def measured(network: str, what: str, which: str) -> float:
    plain, call = made(network)
    if what == "first":
        return of_first_call(network, which)
    if what == "step":
        return seconds(step(network, which))
    vnet = plain.train() if which == "plain" else converted(network, "weights")
    return seconds(lambda: call(vnet))


def serve() -> None:
    """Answer each line that asks for a measurement."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(measured(*line.rstrip("\n").split("\t")), flush=True)


# --- in the process that asks them

MEASUREMENTS = [
    *(("forward", which) for which in FORWARDS),
    *(("step", estimator) for estimator in ESTIMATORS),
    *(("first", estimator) for estimator in ("weights", "auto")),
]


def asked(checkout: Path) -> subprocess.Popen[str]:
    """A process that measures the varify of `checkout`."""
    command = [sys.executable, "-W", "ignore", __file__, "--serve"]
    given = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.Popen(command, env=given, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def answer(process: subprocess.Popen[str], network: str, what: str, which: str) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{network}\t{what}\t{which}\n")
    process.stdin.flush()
    told = process.stdout.readline()
    return float(told) if told.strip() else math.nan


def told(what: str, figure: float) -> str:
    return f"{figure:.2f}" if what == "first" else f"{figure * 1e3:.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="", help="part of a network's name")
    options = parser.parse_args()
    checkouts = [Path(__file__).parents[2], *([options.against.resolve()] if options.against else [])]
    processes = [asked(checkout) for checkout in checkouts]
    print("| network | | | here |" + (" there | here/there |" if options.against else ""))
    print("| --- | --- | --- | --- |" + (" --- | --- |" if options.against else ""))
    for network in NETWORKS:
        if options.only not in network:
            continue
        for what, which in MEASUREMENTS:
            rows = [[answer(p, network, what, which) for p in processes] for _ in range(options.repeats)]
            medians = [statistics.median(column) for column in zip(*rows, strict=True)]
            ratio = [f"{statistics.median(row[0] / row[1] for row in rows):.2f}"] if options.against else []
            print(
                "| " + " | ".join([network, what, which, *(told(what, m) for m in medians), *ratio]) + " |", flush=True
            )
    for process in processes:
        process.communicate()


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve()
    else:
        main()
