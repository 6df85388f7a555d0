"""Variance of the gradient per estimator, for an MLP and a CNN: what "auto" goes by.

    python -m tests.benchmarks.gradient_variance

A LeNet and an MLP are trained on 8×8 digits (scaled to 32×32) for a while with drawn weights; then, at that point and
on one batch, the gradient of the negative log likelihood is drawn many times with each estimator. Printed is, for each
layer, the variance of the gradient summed over its entries, relative to drawn weights, for mu and for rho.
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import varify
from varify.experiments.data import digits
from varify.experiments.models import MODELS

ESTIMATORS = ("weights", "local", "flipout")
BATCH = 128


def trained(model: str, x: Tensor, y: Tensor) -> varify.VariationalModule:
    torch.manual_seed(0)
    vnet = varify.variationalize(MODELS[model](), prior="gaussian", init="relative")
    optimizer = torch.optim.Adam(varify.parameter_groups(vnet, lr=3e-3, rho_lr=3e-2))
    elbo = varify.ELBO(num_data=len(x), beta=0.01)
    for _ in range(10):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            elbo(vnet, F.cross_entropy, x[batch], y[batch]).loss.backward()
            optimizer.step()
    return vnet


def variances(
    vnet: varify.VariationalModule, loss: Callable[[], Tensor], repeats: int
) -> tuple[dict[str, float], float]:
    """Summed variance of the loss's gradient by `mu`/`rho` and parameter; seconds of a gradient."""
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    start = time.perf_counter()
    for _ in range(repeats):
        vnet.zero_grad()
        loss().backward()
        for name, q in vnet.posteriors.items():
            for kind, parameter in (("mu", q.mu), ("rho", q.rho)):
                key, grad = f"{kind} {name}", parameter.grad.double()
                sums[key] = sums.get(key, 0) + grad
                squares[key] = squares.get(key, 0) + grad**2
    seconds = (time.perf_counter() - start) / repeats
    return {k: float(((squares[k] - sums[k] ** 2 / repeats) / (repeats - 1)).sum()) for k in sums}, seconds


def _loss(vnet: varify.VariationalModule, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(vnet(x), y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=300)
    options = parser.parse_args()
    images = digits(Path())
    x, y = images.train, images.train_labels
    for model in ("mlp", "lenet"):
        state = trained(model, x, y).state_dict()
        found, seconds = {}, {}
        for estimator in ESTIMATORS:
            vnet = varify.variationalize(MODELS[model](), prior="gaussian", init="relative", estimator=estimator)
            vnet.load_state_dict({**state, "_extra_state": vnet.get_extra_state()})
            torch.manual_seed(1)
            loss = functools.partial(_loss, vnet, x[:BATCH], y[:BATCH])
            found[estimator], seconds[estimator] = variances(vnet, loss, options.repeats)
        print(f"\n{model}: variance of the gradient relative to drawn weights ({options.repeats} draws, batch {BATCH})")
        print(f"{'parameter':16}" + "".join(f"{e + ' mu':>14}{e + ' rho':>14}" for e in ESTIMATORS[1:]))
        weights = [k.removeprefix("mu ") for k in found["weights"] if k.startswith("mu ") and k.endswith("weight")]
        for name in weights:
            ratios = [
                found[e][f"{kind} {name}"] / found["weights"][f"{kind} {name}"]
                for e in ESTIMATORS[1:]
                for kind in ("mu", "rho")
            ]
            print(f"{name:16}" + "".join(f"{ratio:14.3f}" for ratio in ratios))
        print(
            "time of a gradient, relative: "
            + ", ".join(f"{e} {seconds[e] / seconds['weights']:.2f}" for e in ESTIMATORS)
        )


if __name__ == "__main__":
    main()
