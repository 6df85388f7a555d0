"""Mean and variance in one pass: its time in plain forwards, and its NLL on MNIST against that of many draws.

    python -m tests.benchmarks.propagation [--data-root DIR] [--json FILE] [--device cpu] [--repeats 60]

Times: a plain forward, `propagate` and `predict` of 32 draws take turns, without gradients; ratios are of medians.
With --data-root, which holds MNIST as torchvision lays it out, an MLP (784-400-400-10) is trained for a few epochs with
estimator="auto", and part of its test set predicted by 1,000 draws and by propagation.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varify
from tests.benchmarks.defaults import Data, mlp, torchvision_images
from tests.benchmarks.records import machine
from varify.experiments.models import LeNet

RESULTS = Path(__file__).parent / "results" / "propagation.json"
BATCH, DRAWS, GOAL = 256, 1000, 2.5
Figures = dict[str, float]


def small_data() -> Data:
    return Data((torch.zeros(1), torch.zeros(1)), (torch.zeros(1), torch.zeros(1)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 784-400-400-10": (lambda: mlp(small_data()), (1, 28, 28)),
    "LeNet": (LeNet, (1, 32, 32)),
}


def seconds(run: Callable[[], Any], device: str) -> float:
    """Time of a call; on a CPU that of this process alone, which what else runs there changes less."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


@torch.no_grad()
def ratios(name: str, device: str, repeats: int) -> Figures:
    """Times of propagation and of 32 draws, in plain forwards."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    plain = make().eval().to(device)
    vnet = varify.variationalize(plain).eval()
    x = torch.randn(BATCH, *shape, device=device)
    calls = {
        "plain": lambda: plain(x),
        "propagate": lambda: vnet.propagate(x),
        "predict 32": lambda: vnet.predict(x, n_samples=32),
    }
    times: dict[str, list[float]] = {what: [] for what in calls}
    for i in range(repeats + 3):
        for what, call in calls.items():
            if what == "predict 32" and i % 10:
                continue
            taken = seconds(call, device)
            if i >= 3 or what == "predict 32":
                times[what].append(taken)
    medians = {what: statistics.median(found) for what, found in times.items()}
    return {"plain ms": 1e3 * medians["plain"]} | {w: medians[w] / medians["plain"] for w in calls if w != "plain"}


def trained(x: Tensor, y: Tensor, epochs: int) -> varify.VariationalModule:
    torch.manual_seed(0)
    vnet = varify.variationalize(mlp(small_data()), estimator="auto")
    elbo = varify.ELBO(num_data=len(x))
    optimizer = torch.optim.Adam(varify.parameter_groups(vnet, 1e-3))
    vnet.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            elbo(vnet, nn.CrossEntropyLoss(), x[rows], y[rows]).loss.backward()
            optimizer.step()
    return vnet.eval()


def on_mnist(root: Path, epochs: int, images: int) -> Figures:
    x, y, test, labels = torchvision_images(root, "MNIST")
    mean, std = x.mean(), x.std()
    vnet = trained((x - mean) / std, y, epochs)
    with torch.no_grad():
        return evaluated(vnet, (test[:images] - mean) / std, labels[:images])


def evaluated(vnet: varify.VariationalModule, test: Tensor, labels: Tensor) -> Figures:
    found: dict[str, list[Tensor]] = {}
    for images in test.split(500):
        draws, propagated = vnet.predict(images, n_samples=DRAWS), vnet.propagate(images)
        probabilities = {
            "mean weights": vnet(images).softmax(-1),
            f"{DRAWS} draws": draws.probabilities(),
            "propagate": propagated.probabilities(),
        }
        for what, p in probabilities.items():
            found.setdefault(what, []).append(p)
        found.setdefault("std", []).append(propagated.std)
        found.setdefault("std of draws", []).append(draws.std)
    std, std_of_draws = (torch.cat(found.pop(what)) for what in ("std", "std of draws"))
    figures: Figures = {"mean std / that of draws": float((std / std_of_draws).mean())}
    for what, parts in found.items():
        p = torch.cat(parts)
        figures[f"nll, {what}"] = float(F.nll_loss(p.clamp_min(1e-12).log(), labels))
        figures[f"error %, {what}"] = 100 * float((p.argmax(-1) != labels).float().mean())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=2000, help="of the test set, the first ones")
    options = parser.parse_args()
    record: dict[str, Any] = {"machine": machine(), "device": options.device, "batch": BATCH}
    record["threads"] = torch.get_num_threads()
    for name in NETWORKS:
        record[name] = ratios(name, options.device, options.repeats)
        print(name, {key: round(value, 2) for key, value in record[name].items()}, f"goal {GOAL}", flush=True)
    if options.data_root:
        about = {"epochs": options.epochs, "images": options.images}
        record["MNIST"] = about | on_mnist(options.data_root, options.epochs, options.images)
        print({key: round(value, 4) for key, value in record["MNIST"].items()})
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
