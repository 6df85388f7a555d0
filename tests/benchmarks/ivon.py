"""IVON beside Adam on mu and rho, the plain network, and `ivon-opt` where it is installed: the same data and seeds.

    python -m tests.benchmarks.ivon

A LeNet and an MLP on the 1,348 digits, prior N(0, 1), the whole KL (beta = 1), batch 64, every rate on a cosine.
Printed are accuracy, NLL and ECE on the 449 held-out digits by 32 draws, as means over the seeds, the median processor
time of a step, and the bytes a weight that parameters, gradients and the optimizer's state take, activations apart (and
without what lives within a step or, in ivon-opt, until it: 8 bytes).

`--peer` instead feeds `ivon-opt`'s own draws to varify's IVON, and prints how far the two are apart after 20 steps.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varify
from varify.experiments.data import digits
from varify.experiments.evaluation import calibration_error
from varify.experiments.models import MODELS

BATCH, DRAWS = 64, 32
HESS, BETAS = 1.0, (0.9, 0.9999)


class Run(NamedTuple):
    """Of one training: what predicts, the seconds of a step, the bytes a weight."""

    log_p: Callable[[Tensor], Tensor]
    seconds: float
    bytes: float


class Arm(NamedTuple):
    """What one step does, the optimizer, and how log p(y|x) is predicted."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Tensor, Tensor], None]
    log_p: Callable[[Tensor], Tensor]


def variational(model: str, estimator: str) -> varify.VariationalModule:
    prior, init = varify.priors.Gaussian(std=1.0), varify.inits.Constant(0.01)
    return varify.variationalize(MODELS[model](), prior=prior, init=init, estimator=estimator).train()


def plain(model: str, num_data: int, lr: float) -> Arm:
    net = MODELS[model]()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return Arm(net, optimizer, step, lambda x: F.log_softmax(net.eval()(x), 1))


def bayesian(kind: str, estimator: str) -> Callable[[str, int, float], Arm]:
    def arm(model: str, num_data: int, lr: float) -> Arm:
        vnet, elbo = variational(model, estimator), varify.ELBO(num_data=num_data, beta=1)
        optimizer: torch.optim.Optimizer = (
            varify.optim.IVON(vnet, lr, num_data=num_data, betas=BETAS, hess_init=HESS)
            if kind == "ivon"
            else torch.optim.Adam(varify.parameter_groups(vnet, lr=1e-3, rho_lr=1e-2))
        )

        def step(x: Tensor, y: Tensor) -> None:
            optimizer.zero_grad()
            terms = elbo(vnet, F.cross_entropy, x, y)
            (terms.nll if kind == "ivon" else terms.loss).backward()
            optimizer.step()

        return Arm(vnet, optimizer, step, lambda x: vnet.predict(x, n_samples=DRAWS).probabilities().log())

    return arm


def ivon_opt(model: str, num_data: int, lr: float) -> Arm:
    import ivon

    net = MODELS[model]()
    optimizer = ivon.IVON(
        net.parameters(),
        lr=lr,
        ess=num_data,
        weight_decay=1 / num_data,
        hess_init=HESS,
        beta1=BETAS[0],
        beta2=BETAS[1],
    )

    def step(x: Tensor, y: Tensor) -> None:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
        optimizer.step()

    @torch.no_grad()
    def log_p(x: Tensor) -> Tensor:
        found = []
        for _ in range(DRAWS):
            with optimizer.sampled_params():
                found.append(net(x).softmax(1))
        return torch.stack(found).mean(0).log()

    return Arm(net, optimizer, step, log_p)


ARMS: dict[str, Callable[[str, int, float], Arm]] = {
    "plain, Adam": plain,
    "Adam, drawn weights": bayesian("adam", "weights"),
    "Adam, auto": bayesian("adam", "auto"),
    "IVON, drawn weights": bayesian("ivon", "weights"),
    "IVON, auto": bayesian("ivon", "auto"),
    "ivon-opt": ivon_opt,
}


def train(arm: Arm, x: Tensor, y: Tensor, epochs: int) -> Run:
    steps = epochs * len(x.split(BATCH))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(arm.optimizer, steps)
    times = []
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            start = time.process_time()
            arm.step(x[batch], y[batch])
            times.append(time.process_time() - start)
            schedule.step()
    parameters = list(arm.network.parameters())
    kept = [*parameters, *(p.grad for p in parameters if p.grad is not None), *tensors(arm.optimizer)]
    weights = sum(p.numel() for p in getattr(arm.network, "module", arm.network).parameters())
    return Run(arm.log_p, statistics.median(times), sum(t.numel() * t.element_size() for t in kept) / weights)


def tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All that the optimizer keeps, of which ivon-opt has a part in its groups."""
    states = [state for state in optimizer.state.values() if isinstance(state, dict)]
    found = [value for table in (*states, *optimizer.param_groups) for value in table.values()]
    return [value for value in found if isinstance(value, Tensor)]


def compare(models: list[str], arms: list[str], seeds: int, epochs: int, lr: float) -> None:
    images = digits(Path())
    for model in models:
        print(f"\n{model}, {epochs} epochs, {seeds} seeds")
        print(f"{'':22}{'accuracy':>10}{'NLL':>8}{'ECE':>8}{'ms a step':>11}{'bytes a weight':>16}")
        for name in arms:
            rows = []
            for seed in range(seeds):
                torch.manual_seed(seed)
                arm = ARMS[name](model, len(images.train), lr)
                run = train(arm, images.train, images.train_labels, epochs)
                torch.manual_seed(seed)
                log_p, labels = run.log_p(images.test).detach(), images.test_labels
                accuracy = (log_p.argmax(1) == labels).float().mean().item()
                figures = (accuracy, F.nll_loss(log_p, labels).item(), calibration_error(log_p.exp(), labels))
                rows.append((*figures, run.seconds * 1e3, run.bytes))
            mean = [statistics.mean(column) for column in zip(*rows, strict=True)]
            print(f"{name:22}{mean[0]:10.4f}{mean[1]:8.4f}{mean[2]:8.4f}{mean[3]:11.1f}{mean[4]:16.1f}", flush=True)


def against_the_peer(model: str, steps: int, lr: float) -> None:
    images = digits(Path())
    n = len(images.train)
    torch.manual_seed(0)
    theirs = ivon_opt(model, n, lr)
    torch.manual_seed(0)
    sigma = (n * (HESS + 1 / n)) ** -0.5  # theirs to begin with
    vnet = varify.variationalize(
        MODELS[model](), prior=varify.priors.Gaussian(std=1.0), init=varify.inits.Constant(sigma)
    ).train()
    ours = varify.optim.IVON(vnet, lr, num_data=n, betas=BETAS, hess_init=HESS)
    start = [p.detach().clone() for p in theirs.network.parameters()]
    names = [name for name, _ in theirs.network.named_parameters()]
    optimizer = theirs.optimizer
    for _ in range(steps):
        batch = torch.randperm(n)[:BATCH]
        x, y = images.train[batch], images.train_labels[batch]
        means = [p.detach().clone() for p in theirs.network.parameters()]
        group = optimizer.param_groups[0]
        scale = (group["ess"] * (group["hess"] + group["weight_decay"])).sqrt()
        scales = [s.view_as(m) for s, m in zip(scale.split([m.numel() for m in means]), means, strict=True)]
        with optimizer.sampled_params(train=True):
            drawn = [p.detach().clone() for p in theirs.network.parameters()]
            optimizer.zero_grad()
            F.cross_entropy(theirs.network(x), y).backward()
        optimizer.step()
        noise = {k: (d - m) * s for k, d, m, s in zip(names, drawn, means, scales, strict=True)}
        with vnet.fixed_draw(noise):
            ours.zero_grad()
            F.cross_entropy(vnet(x), y).backward()
        ours.step()
    mean = torch.cat([p.detach().flatten() for p in theirs.network.parameters()])
    ours_mean = torch.cat([vnet.posteriors[name].mu.detach().flatten() for name in names])
    moved = (mean - torch.cat([p.flatten() for p in start])).norm()
    group = optimizer.param_groups[0]
    sigma_of = (group["ess"] * (group["hess"] + group["weight_decay"])).rsqrt()
    ours_sigma = torch.cat([vnet.posteriors[name].sigma.detach().flatten() for name in names])
    print(f"{model}, {steps} steps: means apart by {(mean - ours_mean).norm() / moved:.1e} of the way they went,")
    print(f"sigmas by {(ours_sigma / sigma_of - 1).abs().max():.1e} of themselves at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mlp", "lenet"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.3)
    parser.add_argument("--peer", action="store_true")
    options = parser.parse_args()
    if options.peer:
        for model in options.models:
            against_the_peer(model, 20, options.lr)
    else:
        compare(options.models, options.arms, options.seeds, options.epochs, options.lr)


if __name__ == "__main__":
    main()
