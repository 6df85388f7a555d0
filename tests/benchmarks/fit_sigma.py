"""A plain checkpoint against the same with sigmas fitted to its training data, without a step of training.

    python -m tests.benchmarks.fit_sigma

A LeNet is trained on 300 of the 8×8 digits (scaled to 32×32) in the ordinary way. `fit_sigma` then makes it Bayesian at
several temperatures; the one with the best likelihood on one half of the held-out digits is reported on the other half.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import varify
from varify.experiments.data import Images, digits
from varify.experiments.evaluation import evaluate
from varify.experiments.models import LeNet

TEMPERATURES = (0.3, 0.1, 0.05, 0.03, 0.01)


def plain_checkpoint(images: Images, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = LeNet()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(100):
        for batch in torch.randperm(len(images.train)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(network(images.train[batch]), images.train_labels[batch]).backward()
            optimizer.step()
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--curvature", default="ggn")
    options = parser.parse_args()
    everything = digits(Path())
    print(f"{'':6}{'network':24}{'accuracy':>10}{'NLL':>10}{'ECE':>10}")
    for seed in range(options.seeds):
        chosen = torch.randperm(len(everything.train), generator=torch.Generator().manual_seed(seed))[:300]
        half = torch.arange(len(everything.test)) % 2 == 0
        images = replace(everything, train=everything.train[chosen], train_labels=everything.train_labels[chosen])
        tuning = replace(images, test=images.test[half], test_labels=images.test_labels[half])
        testing = replace(images, test=images.test[~half], test_labels=images.test_labels[~half])
        network = plain_checkpoint(images, seed)
        best: tuple[float, float, varify.VariationalModule] | None = None
        for temperature in TEMPERATURES:
            vnet = varify.variationalize(network)
            data = [(images.train, images.train_labels)]
            varify.fit_sigma(
                vnet, data, F.cross_entropy, num_data=300, curvature=options.curvature, temperature=temperature
            )
            nll = evaluate(vnet, tuning, 64, seed).metrics["nll"]
            if best is None or nll < best[0]:
                best = (nll, temperature, vnet)
        assert best is not None
        for name, candidate in (("plain", network), (f"fitted, temperature {best[1]}", best[2])):
            m = evaluate(candidate, testing, 64, seed).metrics
            print(f"{seed:<6}{name:24}{m['accuracy']:10.4f}{m['nll']:10.4f}{m['ece']:10.4f}", flush=True)


if __name__ == "__main__":
    main()
