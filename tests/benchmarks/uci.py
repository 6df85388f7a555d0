"""UCI regression on the literature's splits: test log likelihood and RMSE beside published ones.

    python -m tests.benchmarks.uci --data-root DIR
    python -m tests.benchmarks.uci --sets yacht energy --splits 3 --recipe estimator=auto beta=1 rho_lr=1 --no-json

One hidden layer of 50 units (protein 100), ReLU, a noise level that is learned along; inputs and targets standardised
by the training part, figures in the targets' own units, as mean and standard error over 20 splits (protein 5). The
splits are those of Hernández-Lobato & Adams (2015), made from `RandomState(1)`, which gives their published index
files. One rule for all sets: Adam on a cosine, each step with a batch of `--batch` data; 5,000 steps for the small
sets, 20,000 for those of 7,000 data and more, or `--steps`. The test part chooses nothing within a run.

Prior and start are the library's defaults. The weight of the KL and the rates are this benchmark's own: with a noise
level that is learned and few data, a colder posterior than the bound's takes the noise for too small (boston, yacht);
and rho's that are faster than the means run to the prior before these have learned (energy, concrete).

All splits of a set are trained at once: their parameters are stacked, and `torch.func.vmap` runs the library's own
objective for each, with noise of its own. Adam treats each number alone, so this is what a loop over splits does; only
random numbers differ. `--at-once 1` trains one after the other.

DIR (default: $VARIFY_DATA, else ~/.cache/varify) has `uci/NAME/{data,index_features,index_target}.txt`; what is missing
is downloaded. Figures, settings, machine and date go to tests/benchmarks/results/uci.json.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import varify
from tests.benchmarks.defaults import (
    Data,
    Figures,
    Recipe,
    convert,
    parsed,
    regression,
    standardised,
    uci_orders,
    uci_table,
    weight_of_kl,
)
from tests.benchmarks.records import FOLDER, keep


@dataclass(frozen=True)
class Benchmark:
    """A set, and what others have on it: test log likelihoods of `PUBLISHED`, RMSE of the first two."""

    folder: str
    published: tuple[float, float, float]
    published_rmse: tuple[float, float]
    hidden: int = 50
    splits: int = 20
    steps: int = 5_000


# Probabilistic backpropagation (Hernández-Lobato & Adams 2015, arXiv:1502.05336), the variational matrix Gaussian
# (Louizos & Welling 2016, arXiv:1603.04733, table 1), the better of Uncertainty Baselines' two variational rows
# (mean-field and refined; baselines/uci/README.md).
PUBLISHED = ("PBP", "VMG", "UB")
LONG = 20_000  # steps, for the sets of 7,000 data and more
RECIPE = ["estimator=auto", "beta=linear:1", "rho_lr=0.2"]
SETS = {
    "boston": Benchmark("bostonHousing", (-2.57, -2.54, -2.94), (3.01, 2.81)),
    "concrete": Benchmark("concrete", (-3.16, -2.98, -3.08), (5.67, 4.70)),
    "energy": Benchmark("energy", (-2.04, -1.45, -0.75), (1.80, 1.16)),
    "kin8nm": Benchmark("kin8nm", (0.90, 1.14, 1.06), (0.10, 0.08), steps=LONG),
    "naval": Benchmark("naval-propulsion-plant", (3.73, 5.84, 6.33), (0.01, 0.00), steps=LONG),
    "power": Benchmark("power-plant", (-2.84, -2.78, -2.83), (4.12, 3.88), steps=LONG),
    "protein": Benchmark("protein-tertiary-structure", (-2.97, -2.84, -2.92), (4.73, 4.14), 100, 5, LONG),
    "wine": Benchmark("wine-quality-red", (-0.97, -0.93, -0.97), (0.64, 0.61)),
    "yacht": Benchmark("yacht", (-1.63, -1.29, -1.68), (1.02, 0.77)),
}


class Objective(nn.Module):
    """Network, noise level and negative bound of one split."""

    def __init__(self, benchmark: Benchmark, data: Data, recipe: Recipe, noise: float) -> None:
        super().__init__()
        num_data, features = data.train[0].shape
        plain = nn.Sequential(nn.Linear(features, benchmark.hidden), nn.ReLU(), nn.Linear(benchmark.hidden, 1))
        self.vnet, self.likelihood = convert(plain, recipe), varify.GaussianLikelihood(noise)
        self.elbo = varify.ELBO(num_data=num_data, beta=weight_of_kl(self.vnet, num_data, recipe))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.elbo(self.vnet, self.likelihood, x, y).loss


def splits_of(root: Path, benchmark: Benchmark, count: int) -> Iterator[tuple[Data, float]]:
    """Standardised splits, each with the standard deviation of its targets."""
    x, y = uci_table(root, benchmark.folder)
    n = round(0.9 * len(x))
    for order in uci_orders(len(x), count):
        yield standardised(x[order], y[order], n), float(y[order[:n]].std())


def batches(splits: list[Data], size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end: a batch of each split, `(splits, size, ...)`, in epochs of the splits' own orders."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.stack([data.train[part] for data in splits]) for part in (0, 1))
    count, n = x.shape[:2]
    rows = torch.arange(count)[:, None]
    while True:
        order = torch.rand(count, n, generator=generator).argsort(1)
        for chosen in order.split(size, 1):
            if chosen.shape[1] == min(size, n):  # what is left over waits for another epoch's order
                yield x[rows, chosen], y[rows, chosen]


def train(objectives: list[Objective], splits: list[Data], options: argparse.Namespace, recipe: Recipe) -> None:
    """README's loop for all splits at once."""
    one = objectives[0].train()
    stacked = {
        name: torch.stack([objective.get_parameter(name).detach() for objective in objectives]).requires_grad_()
        for name, _ in one.named_parameters()
    }
    names = {parameter: name for name, parameter in one.named_parameters()}
    groups = varify.parameter_groups(one, options.lr, options.lr * recipe.rho_lr)
    optimizer = torch.optim.Adam(
        [{**group, "params": [stacked[names[p]] for p in group["params"]]} for group in groups]
    )
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    losses = vmap(lambda weights, x, y: functional_call(one, weights, (x, y)), randomness="different")
    one(*(part[: options.batch] for part in splits[0].train))  # the call that is recorded for the estimator
    for _, (x, y) in zip(range(options.steps), batches(splits, options.batch, options.seed), strict=False):
        optimizer.zero_grad()
        losses(stacked, x, y).sum().backward()
        optimizer.step()
        plan.step()
    with torch.no_grad():
        for i, objective in enumerate(objectives):
            for name, parameter in objective.named_parameters():
                parameter.copy_(stacked[name][i])


def run(benchmark: Benchmark, options: argparse.Namespace, recipe: Recipe) -> list[Figures]:
    """Figures of each split: `ll` (nats per datum) and `rmse` in the targets' units, `coverage` of 90 % intervals."""
    pairs = list(splits_of(options.data_root, benchmark, min(options.splits or benchmark.splits, benchmark.splits)))
    torch.manual_seed(options.seed)
    found = []
    for part in (pairs[i : i + options.at_once] for i in range(0, len(pairs), options.at_once)):
        splits = [data for data, _ in part]
        objectives = [Objective(benchmark, data, recipe, options.noise) for data in splits]
        train(objectives, splits, options, recipe)
        for objective, (data, unit) in zip(objectives, part, strict=True):
            figures = regression(objective.vnet, objective.likelihood, data, options.draws)
            found.append(
                {
                    "ll": -figures["nll"] - math.log(unit),
                    "rmse": figures["rmse"] * unit,
                    "noise": figures["noise"] * unit,
                    "coverage": figures["coverage"],
                }
            )
    return found


def mean_and_error(runs: list[Figures], name: str) -> tuple[float, float]:
    values = [run[name] for run in runs]
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def line(name: str, benchmark: Benchmark, runs: list[Figures], seconds: float) -> str:
    (ll, ll_error), (rmse, rmse_error) = mean_and_error(runs, "ll"), mean_and_error(runs, "rmse")
    others = "".join(f"{value:8.2f}" for value in benchmark.published)
    verdict = "".join("+" if ll >= value else "-" for value in benchmark.published)
    return (
        f"{name:10}{ll:8.3f} ± {ll_error:5.3f}{others}   {verdict:5}{rmse:9.4f} ± {rmse_error:6.4f}"
        f"{benchmark.published_rmse[0]:8.2f}{benchmark.published_rmse[1]:8.2f}{seconds:8.0f} s"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS), metavar="SET")
    parser.add_argument("--splits", type=int, default=0, help="at most so many of each set; default: all")
    parser.add_argument("--at-once", type=int, default=20, help="splits that are trained together")
    parser.add_argument("--steps", type=int, default=0, help="default: by the set's size")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--noise", type=float, default=0.1, help="std to start with, of standardised targets")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recipe", nargs="*", default=RECIPE, help="FIELD=VALUE ..., as of defaults.py")
    parser.add_argument(
        "--data-root", type=Path, default=Path(os.environ.get("VARIFY_DATA", Path.home() / ".cache" / "varify"))
    )
    parser.add_argument("--json", type=Path, default=FOLDER / "uci.json", help="sets of an earlier run stay in it")
    parser.add_argument("--no-json", dest="json", action="store_const", const=None)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    recipe = parsed(options.recipe)
    print(f"{'':10}{'log likelihood':>16}" + "".join(f"{name:>8}" for name in PUBLISHED), end="")
    print(f"{'':8}{'RMSE':>18}{'PBP':>8}{'VMG':>8}{'':>8}")
    for name in options.sets:
        chosen = argparse.Namespace(**vars(options) | {"steps": options.steps or SETS[name].steps})
        start = time.perf_counter()
        runs = run(SETS[name], chosen, recipe)
        seconds = time.perf_counter() - start
        print(line(name, SETS[name], runs, seconds), flush=True)
        means = {figure: dict(zip(("mean", "error"), mean_and_error(runs, figure), strict=True)) for figure in runs[0]}
        published = dict(zip(PUBLISHED, SETS[name].published, strict=True))
        told = {k: v for k, v in vars(chosen).items() if k not in ("json", "sets", "recipe", "data_root")}
        settings = {**told, "recipe": asdict(recipe)}
        found = {"settings": settings, "seconds": seconds, "published": published, **means, "splits": runs}
        keep(options.json, name, found)


if __name__ == "__main__":
    main()
