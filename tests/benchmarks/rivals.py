"""What else gives a network uncertainty, on MNIST and Fashion-MNIST, with the same data, batches, epochs and draws.

    pip install --no-deps laplace-torch ivon-opt curvlinops-for-pytorch asdfghjkl opt-einsum backpack-for-pytorch
    python -m tests.benchmarks.rivals --data-root DIR
    python -m tests.benchmarks.rivals --tasks mnist-mlp --methods mixture --epochs 6   # six times as long

An MLP (784-400-400-10) and a LeNet, 10 epochs, all by Adam at 2e-3 on a cosine, batch 128, but for the two IVONs,
whose rate is `--ivon-lr`. Figures as those of defaults.py: error (%), NLL (nats), ECE (%), AUROC of the mutual
information (of one plain network the entropy) against the other set; seconds of training; and the deep-ensemble
equivalent (Ashukha et al. 2020, arXiv:2002.06470): how many plain networks, averaged, have this NLL, read off the means
over all choices of so many of the members, with a line between whole numbers. The NLL is the one that a method gives,
without a temperature (theirs is that after one is fitted).

Peers that are not installed are left out, with a word. Figures, settings, machine and date go to
tests/benchmarks/results/rivals.json.
"""

import argparse
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varify
from tests.benchmarks.defaults import (
    TASKS,
    Data,
    Figures,
    Task,
    batches,
    classified,
    convert,
    mlp,
    mnist,
    parsed,
    samples,
    train,
)
from tests.benchmarks.records import FOLDER, keep

FASHION_MLP = Task(mlp, lambda root, seed: mnist(root, "FashionMNIST", "MNIST"), 10, 128)
RIVALS = {
    "mnist-mlp": TASKS["mnist-mlp"],
    "fashion-mlp": FASHION_MLP,
    "mnist-lenet": TASKS["mnist-lenet"],
    "fashion-lenet": TASKS["fashion-lenet"],
}
DROPOUT = 0.2
IVON_BETAS, IVON_HESS, IVON_DECAY = (0.9, 0.9999), 0.1, 1e-4
# From inputs `(n, ...)` to logits of the draws `(draws, n, classes)`; what is no logit is a log-probability.
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """One task with its data, a seed and the command line's options."""

    task: Task
    data: Data
    seed: int
    options: argparse.Namespace

    @property
    def num_data(self) -> int:
        return len(self.data.train[0])

    def network(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.task.network(self.data)

    def trained(self, seed: int, change: Callable[[nn.Module], nn.Module] = lambda network: network) -> nn.Module:
        """A network from its own start, in its own order of the data, by defaults.py's loop."""
        network = change(self.network(seed))
        train(network, F.cross_entropy, self.data, self.task, self.options, seed, self.options.recipe)
        return network

    def loop(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batches, for a method whose step is another; the rate falls on a cosine."""
        epochs = max(1, round(self.task.epochs * self.options.epochs))
        steps = epochs * math.ceil(self.num_data / self.task.batch)
        plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for batch in batches(self.data, self.task, epochs, self.seed):
            yield batch
            plan.step()


def predicted(network: nn.Module, options: argparse.Namespace) -> Predict:
    return lambda x: samples(network, x, options.draws)


# ---------------------------------------------------------------------------------------------------------- methods


def dropout(setting: Setting) -> Predict:
    """MC dropout (Gal & Ghahramani 2016): before every linear layer but one that is given the image."""
    network = setting.network(setting.seed)
    layers = [module for module in network.modules() if list(module.parameters(recurse=False))]
    for layer in layers[1:]:
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda layer, args: (F.dropout(args[0], DROPOUT),))
    train(network, F.cross_entropy, setting.data, setting.task, setting.options, setting.seed, setting.options.recipe)

    def predict(x: Tensor) -> Tensor:
        return torch.cat([samples(network, x, 1) for _ in range(setting.options.draws)])

    return predict


class Batched:
    """What laplace-torch takes for a loader: batches, and their data set's size."""

    def __init__(self, data: Data) -> None:
        self.dataset = torch.utils.data.TensorDataset(*data.train)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(*(part.split(500) for part in self.dataset.tensors), strict=True)

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / 500)


def laplace(setting: Setting) -> Predict:
    """The last layer's Kronecker-factored Laplace posterior, its prior by the marginal likelihood; linearized."""
    from tests import operators

    operators.declare()
    import laplace as peer

    network = setting.trained(setting.seed).eval()
    posterior = peer.Laplace(network, "classification", subset_of_weights="last_layer", hessian_structure="kron")
    posterior.fit(Batched(setting.data))
    posterior.optimize_prior_precision(method="marglik")

    def predict(x: Tensor) -> Tensor:
        parts = [posterior.predictive_samples(part, n_samples=setting.options.draws) for part in x.split(1000)]
        return torch.cat(parts, 1).detach().double().clamp_min(1e-300).log()

    return predict


def ivon_opt(setting: Setting) -> Predict:
    import ivon

    network = setting.network(setting.seed)
    optimizer = ivon.IVON(
        network.parameters(),
        lr=setting.options.ivon_lr,
        ess=setting.num_data,
        weight_decay=IVON_DECAY,
        hess_init=IVON_HESS,
        beta1=IVON_BETAS[0],
        beta2=IVON_BETAS[1],
    )
    for x, y in setting.loop(optimizer):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
        optimizer.step()

    def predict(x: Tensor) -> Tensor:
        network.eval()
        torch.manual_seed(0)
        found = []
        for _ in range(setting.options.draws):
            with optimizer.sampled_params():
                found.append(samples(network, x, 1))
        return torch.cat(found)

    return predict


def ivon(setting: Setting) -> Predict:
    """varify's, with the same prior as ivon-opt's weight decay: N(0, 1/(num_data·decay))."""
    std = (setting.num_data * IVON_DECAY) ** -0.5
    vnet = varify.variationalize(setting.network(setting.seed), prior=varify.priors.Gaussian(std=std)).train()
    optimizer = varify.optim.IVON(
        vnet, setting.options.ivon_lr, num_data=setting.num_data, betas=IVON_BETAS, hess_init=IVON_HESS
    )
    elbo = varify.ELBO(num_data=setting.num_data)
    for x, y in setting.loop(optimizer):
        optimizer.zero_grad()
        elbo(vnet, F.cross_entropy, x, y).nll.backward()
        optimizer.step()
    return predicted(vnet, setting.options)


def twin(setting: Setting) -> Predict:
    """varify's defaults."""
    vnet = setting.trained(setting.seed, lambda network: convert(network, setting.options.recipe))
    return predicted(vnet, setting.options)


def mixture(setting: Setting) -> Predict:
    """Blundell's prior (2015, section 5.1: sigma_1 of exp(0, -1, -2), sigma_2 of exp(-6, -7, -8)) with the defaults."""
    prior = varify.priors.ScaleMixture(sigma_1=1.0, sigma_2=math.exp(-6), pi=0.5)
    estimator = setting.options.recipe.estimator
    vnet = setting.trained(setting.seed, lambda n: varify.variationalize(n, prior=prior, estimator=estimator))
    return predicted(vnet, setting.options)


METHODS: dict[str, Callable[[Setting], Predict]] = {
    "dropout": dropout,
    "laplace": laplace,
    "ivon-opt": ivon_opt,
    "twin": twin,
    "ivon": ivon,
    "mixture": mixture,
}


# -------------------------------------------------------------------------------------------------------- ensembles


def ensembles(members: list[tuple[Tensor, Tensor]], labels: Tensor) -> tuple[dict[str, Figures], list[float]]:
    """Figures of one member and of all, and the NLL by number of members, as a mean over all choices of so many.

    Args:
        members: logits on the test set and on the other one, each `(1, n, classes)`.
        labels: of the test set.
    """
    curve = []
    for size in range(1, len(members) + 1):
        chosen = itertools.combinations([usual for usual, _ in members], size)
        curve.append(statistics.fmean(classified(torch.cat(logits), labels)["nll"] for logits in chosen))
    together = [torch.cat(parts) for parts in zip(*members, strict=True)]
    figures = {
        name: classified(usual, labels, strange)
        for name, (usual, strange) in zip(("plain", "ensemble"), (members[0], together), strict=True)
    }
    return figures, curve


def equivalent(nll: float, curve: list[float]) -> float:
    """How many members have this NLL: at least 1, infinity where no number that was tried has."""
    if nll >= curve[0]:
        return 1.0
    for size, (before, after) in enumerate(itertools.pairwise(curve), 1):
        if after <= nll:
            return size + (before - nll) / (before - after)
    return math.inf


# ----------------------------------------------------------------------------------------------------------- output


def run(task: Task, options: argparse.Namespace, seed: int) -> Iterator[tuple[str, Figures, list[float]]]:
    """Name, figures and, of the ensemble, the NLL by number of members."""
    setting = Setting(task, task.data(options.data_root, seed), seed, options)
    (x, labels), other = setting.data.test, setting.data.other
    assert other is not None
    curve: list[float] = []
    if options.members:
        start = time.perf_counter()
        seeds = [seed + 1000 * i for i in range(options.members)]  # the first is what the other methods start from
        members = [predicted(setting.trained(s), options) for s in seeds]
        seconds = time.perf_counter() - start
        figures, curve = ensembles([(predict(x), predict(other)) for predict in members], labels)
        yield "plain", figures["plain"] | {"seconds": seconds / options.members}, []
        yield "ensemble", figures["ensemble"] | {"seconds": seconds}, curve
    for name in options.methods:
        start = time.perf_counter()
        try:
            predict = METHODS[name](setting)
        except ImportError as error:
            print(f"{name}: left out, {error}", flush=True)
            continue
        seconds = time.perf_counter() - start
        figures = classified(predict(x), labels, predict(other)) | {"seconds": seconds}
        if curve:
            figures["members"] = equivalent(figures["nll"], curve)
        yield name, figures, []


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(RIVALS), choices=list(RIVALS), metavar="TASK")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--members", type=int, default=5, help="of the ensemble; 0 leaves it and the plain one out")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=1.0, help="multiplies each task's number of epochs")
    parser.add_argument("--ivon-lr", type=float, default=0.3)
    parser.add_argument("--draws", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recipe", nargs="*", default=["estimator=auto"], help="FIELD=VALUE ..., as of defaults.py")
    parser.add_argument(
        "--data-root", type=Path, default=Path(os.environ.get("VARIFY_DATA", Path.home() / ".cache" / "varify"))
    )
    parser.add_argument("--json", type=Path, default=FOLDER / "rivals.json", help="runs of other settings stay in it")
    parser.add_argument("--no-json", dest="json", action="store_const", const=None)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    options.recipe, options.lr, options.plan = parsed(options.recipe), 0.0, "cosine"  # of defaults.py's loop
    for name, seed in itertools.product(options.tasks, range(options.seeds)):
        for method, figures, curve in run(RIVALS[name], options, seed):
            print(f"{name:14}{method:10}" + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)
            key = f"{name}, {method}, seed {seed}, epochs x {options.epochs:g}"
            settings = {"draws": options.draws, "recipe": asdict(options.recipe), "members": options.members}
            settings |= {"ivon_lr": options.ivon_lr} if "ivon" in method else {}
            keep(options.json, key, {"settings": settings, **figures, **({"nll by members": curve} if curve else {})})


if __name__ == "__main__":
    main()
