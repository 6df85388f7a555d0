"""A plain checkpoint against the same with sigmas fitted to its training data, without a step of training.

    python -m tests.benchmarks.fit_sigma

A LeNet is trained on 300 of the 8×8 digits (scaled to 32×32) in the ordinary way. `fit_sigma` with its defaults then
makes it Bayesian. It predicts at temperature 1, and at those that `fit_temperature` finds on one half of the held-out
digits by either rule; by draws of the weights, and by the linear expansion at the means. All figures are of the other
half. No number is chosen by hand.
"""

import argparse
import copy
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varify
from varify.experiments.data import Images, digits
from varify.experiments.evaluation import calibration_error
from varify.experiments.models import LeNet

DRAWS = 64


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


def predicted(vnet: varify.VariationalModule, x: Tensor, seed: int, linearized: bool) -> Tensor:
    torch.manual_seed(seed)
    samples = vnet.predict(x, n_samples=DRAWS, linearized=linearized).samples.double()
    return varify.Prediction(samples).probabilities()


def report(seed: int, name: str, p: Tensor, labels: Tensor) -> None:
    accuracy, nll = (p.argmax(1) == labels).double().mean().item(), F.nll_loss(p.log(), labels).item()
    print(f"{seed:<6}{name:36}{accuracy:10.4f}{nll:10.4f}{calibration_error(p, labels):10.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--curvature", default="ggn")
    options = parser.parse_args()
    everything = digits(Path())
    half = torch.arange(len(everything.test)) % 2 == 0
    validation = [(everything.test[half], everything.test_labels[half])]
    x, y = everything.test[~half], everything.test_labels[~half]
    print(f"{'':6}{'network':36}{'accuracy':>10}{'NLL':>10}{'ECE':>10}")
    for seed in range(options.seeds):
        chosen = torch.randperm(len(everything.train), generator=torch.Generator().manual_seed(seed))[:300]
        images = replace(everything, train=everything.train[chosen], train_labels=everything.train_labels[chosen])
        network = plain_checkpoint(images, seed)
        with torch.no_grad():
            report(seed, "plain", network(x).double().softmax(1), y)
        fitted = varify.variationalize(network, prior="gaussian")
        training = [(images.train, images.train_labels)]
        varify.fit_sigma(fitted, training, F.cross_entropy, num_data=300, curvature=options.curvature)
        for rule, linearized in ((None, False), ("nll", False), ("tfb", False), (None, True), ("nll", True)):
            vnet, t = copy.deepcopy(fitted), 1.0
            if rule:
                t = varify.fit_temperature(vnet, validation, F.cross_entropy, rule=rule, linearized=linearized)
            name = f"{'linearized, ' if linearized else ''}temperature {t:.2g}{f' ({rule})' if rule else ''}"
            report(seed, name, predicted(vnet, x, seed, linearized), y)


if __name__ == "__main__":
    main()
