"""What the benchmarks compute by themselves."""

import argparse
import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.benchmarks import rivals, uci
from tests.benchmarks.defaults import TASKS, Data, parsed

FILES = sorted(Path(__file__).parent.glob("benchmarks/**/[!_]*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_benchmark_can_be_imported_and_says_what_it_measures(file: Path) -> None:
    name = ".".join(file.with_suffix("").relative_to(Path(__file__).parent.parent).parts)
    assert (importlib.import_module(name).__doc__ or "").strip(), f"{name} does not say what it measures"


def made_up(seed: int) -> Data:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed))
    y = x.sum(1, keepdim=True).sin()
    return Data((x[:30], y[:30]), (x[30:], y[30:]))


def test_splits_at_once_are_trained_as_one_after_the_other() -> None:
    """Without noise and KL, the means of each split go where plain networks go under torch's Adam, one by one."""
    recipe = parsed(["sigma=constant:1e-12", "rho_lr=0", "beta=0", "estimator=auto"])
    options = argparse.Namespace(steps=12, batch=7, lr=0.01, seed=3, noise=0.3)
    splits = [made_up(0), made_up(1)]
    objectives = [uci.Objective(uci.SETS["yacht"], data, recipe, options.noise) for data in splits]
    plain = [objective.vnet.mean_model() for objective in objectives]
    uci.train(objectives, splits, options, recipe)
    for i, network in enumerate(plain):
        rho = torch.tensor(math.log(math.expm1(options.noise)), requires_grad=True)
        optimizer = torch.optim.Adam([*network.parameters(), rho], options.lr)
        stream = uci.batches(splits, options.batch, options.seed)
        for step in range(options.steps):
            x, y = (part[i] for part in next(stream))
            optimizer.param_groups[0]["lr"] = options.lr * (1 + math.cos(math.pi * step / options.steps)) / 2
            optimizer.zero_grad()
            F.gaussian_nll_loss(network(x), y, F.softplus(rho).square().expand_as(y)).backward()
            optimizer.step()
        for name, weight in network.named_parameters():
            torch.testing.assert_close(objectives[i].vnet.posteriors[name].mu, weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(objectives[i].likelihood.sigma, F.softplus(rho), rtol=1e-4, atol=1e-5)


def test_batches_go_through_all_data_before_one_comes_again() -> None:
    data = [made_up(0)]
    stream = uci.batches(data, 10, 0)
    epoch = torch.cat([next(stream)[0][0] for _ in range(3)])
    torch.testing.assert_close(epoch.sort(0).values, data[0].train[0].sort(0).values)


def test_the_equivalent_number_of_members() -> None:
    curve = [0.10, 0.08, 0.07]
    assert rivals.equivalent(0.09, curve) == pytest.approx(1.5)
    assert rivals.equivalent(0.075, curve) == pytest.approx(2.5)
    assert rivals.equivalent(0.2, curve) == 1
    assert rivals.equivalent(0.01, curve) == math.inf


def test_an_ensemble_of_equal_members_gains_nothing() -> None:
    torch.manual_seed(0)
    logits, strange, labels = torch.randn(1, 50, 4), torch.randn(1, 30, 4), torch.randint(4, (50,))
    figures, curve = rivals.ensembles([(logits, strange)] * 3, labels)
    expected = F.cross_entropy(logits[0], labels).item()
    assert curve == pytest.approx([expected] * 3, rel=1e-5)
    assert figures["ensemble"]["nll"] == pytest.approx(expected, rel=1e-5)
    # nothing to disagree on: the mutual information of the three is 0 everywhere, within rounding
    assert figures["plain"]["error"] == figures["ensemble"]["error"]


@pytest.mark.parametrize("task", ["mnist-mlp", "trec", "demand", "yacht", "cifar10"])
def test_data_that_are_not_there_are_told_of_in_a_line(task: str, tmp_path: Path, monkeypatch: Any) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no net,\nno data")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("urllib.request.urlretrieve", offline)
    with pytest.raises(SystemExit, match=f"{tmp_path}.*[sS]ay --data-root") as told:
        TASKS[task].data(tmp_path, 0)
    assert "\n" not in str(told.value)
