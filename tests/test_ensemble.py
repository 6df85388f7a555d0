"""An ensemble: the same networks for every call, over a loader, within memory, in a file."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import varify
from tests.networks import CASES, DictOutput, seeded
from varify import ArgumentError, Prediction


def small() -> varify.VariationalModule:
    torch.manual_seed(0)
    inner = varify.variationalize(nn.Linear(8, 8))
    return varify.variationalize(
        nn.Sequential(nn.Linear(3, 8), inner, nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    )


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "transformer", "tied", "nested"])
@pytest.mark.parametrize("vectorize", [None, False])
def test_predictions_are_those_of_the_plain_modules(name: str, vectorize: bool | None) -> None:
    if name == "nested":
        vnet, args, kwargs = small(), (torch.randn(5, 3),), {}
    else:
        vnet = varify.variationalize(seeded(CASES[name]))
        args, kwargs = CASES[name].calls[0]
    ensemble = vnet.train().ensemble(4, seed=0)
    found = ensemble.predict(*args, vectorize=vectorize, **kwargs).samples
    networks = list(ensemble)
    assert len(networks) == len(ensemble) == 4
    for network, sample in zip(networks, found, strict=True):
        assert type(network) is type(vnet.module)
        assert not network.training
        assert not any(isinstance(module, varify.VariationalModule) for module in network.modules())
        torch.testing.assert_close(network(*args, **kwargs), sample, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ensemble[-1](*args, **kwargs), found[-1], rtol=1e-4, atol=1e-5)
    with pytest.raises(IndexError):
        ensemble[4]


def test_draws_have_the_posteriors_mean_and_variance() -> None:
    vnet = varify.variationalize(nn.Linear(2, 3), init=varify.inits.Constant(0.3))
    weights = torch.stack([network.weight.detach() for network in vnet.ensemble(2000, seed=0)])
    q = vnet.posteriors["weight"]
    # 6 means and 6 variances; five standard errors: 1 false alarm in 140,000
    assert ((weights.mean(0) - q.mu).abs() < 5 * 0.3 / 2000**0.5).all()
    assert ((weights.var(0) / 0.09 - 1).abs() < 5 * (2 / 2000) ** 0.5).all()


def test_every_call_meets_the_same_functions_whatever_becomes_of_the_posterior_and_the_memory() -> None:
    vnet, x = small(), torch.randn(6, 3)
    ensemble = vnet.ensemble(5, seed=3)
    before = ensemble.predict(x).samples
    none, some = vnet.ensemble(5, seed=3, memory=0), vnet.ensemble(8, seed=3, memory=3 * ensemble._bytes)
    assert (ensemble.n_kept, none.n_kept, some.n_kept) == (5, 0, 3)
    assert repr(some) == f"Ensemble(8 draws of a Sequential, {ensemble._bytes:,} bytes each, 3 in memory)"
    assert ensemble._bytes == 4 * sum(q.mu.numel() for part in (vnet, vnet.module[1]) for q in part.posteriors.values())
    with torch.no_grad():
        for parameter in vnet.parameters():
            parameter.add_(1.0)
    vnet.module[2].running_mean += 1
    for other in (ensemble, none, some):
        assert torch.equal(other.predict(x).samples[:5], before)
    torch.testing.assert_close(torch.cat([ensemble.predict(part).samples for part in x.split(4)], 1), before)
    assert not torch.allclose(vnet.ensemble(5, seed=3).predict(x).samples, before)
    torch.manual_seed(5)
    one = vnet.ensemble(2).seeds
    torch.manual_seed(5)
    assert one == vnet.ensemble(2).seeds != vnet.ensemble(2).seeds


def test_gradients_are_those_by_the_inputs() -> None:
    ensemble, x = small().ensemble(3, seed=0), torch.randn(4, 3, requires_grad=True)
    assert not ensemble.predict(x).samples.requires_grad
    (found,) = torch.autograd.grad(ensemble.predict(x, gradients=True).mean.sum(), x)
    (expected,) = torch.autograd.grad(torch.stack([network(x) for network in ensemble]).mean(0).sum(), x)
    torch.testing.assert_close(found, expected)


# --- over a loader


def test_a_loader_is_predicted_as_one_batch() -> None:
    ensemble, x, y = small().ensemble(4, seed=0), torch.randn(10, 3), torch.zeros(10)
    whole = ensemble.predict(x)
    for data in (TensorDataset(x, y), TensorDataset(x), x):
        found = ensemble.predict_loader(DataLoader(data, batch_size=4))
        assert isinstance(found, Prediction)
        torch.testing.assert_close(found.samples, whole.samples)
    batches = [{"a": part, "b": 0} for part in x.split(4)]
    found = ensemble.predict_loader(batches, inputs=lambda batch: batch["a"], outputs="probabilities", class_dim=1)
    assert (found.outputs, found.class_dim) == ("probabilities", 1)
    kept = ensemble.predict_loader(
        x.split(3),
        lambda p: {"mean": p.mean, "rest": (p.std, p.entropy(), p.quantile(0.5), *p.interval(0.8))},
        progress=False,
    )
    torch.testing.assert_close(kept["mean"], whole.mean)
    ends = [torch.tensor(whole.samples.numpy(force=True)).quantile(q, 0) for q in (0.1, 0.9)]
    torch.testing.assert_close(kept["rest"], (whole.std, whole.entropy(), whole.quantile(0.5), *ends))


def test_structures_are_joined_leaf_by_leaf_and_sequences_along_their_own_dimension() -> None:
    ensemble = varify.variationalize(DictOutput()).ensemble(3, seed=0)
    x = torch.randn(5, 3)
    found = ensemble.predict_loader([{"x": part} for part in x.split(2)], inputs=lambda batch: (batch,))
    whole = ensemble.predict({"x": x})
    torch.testing.assert_close(found["logits"].samples, whole["logits"].samples)
    torch.testing.assert_close(found["extra"][0].samples, whole["extra"][0].samples)
    assert found["extra"][1:] == (None, "a name")
    linear, x = varify.variationalize(nn.Linear(3, 2)).ensemble(3, seed=0), torch.randn(4, 6, 3)
    joined = linear.predict_loader(x.split(4, dim=1), dim=1)
    torch.testing.assert_close(joined.samples, linear.predict(x).samples)


def test_a_bar_is_shown_if_asked_for_and_not_to_what_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    ensemble, x = small().ensemble(2, seed=0), torch.randn(10, 3)
    ensemble.predict_loader(DataLoader(x, batch_size=5))
    assert capsys.readouterr() == ("", "")
    ensemble.predict_loader(DataLoader(x, batch_size=5), progress=True)
    assert "2/2" in capsys.readouterr().err


MEMORY_OF_A_LOADER = """
import resource, torch, varify
from torch import nn
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
ensemble = varify.variationalize(nn.Linear(8, 1000)).ensemble(100, seed=0)
print(peak())
for n in (100, 500):
    batches = torch.randn(n, 8).split(100)
    kept = ensemble.predict_loader(batches, lambda p: (p.mean, *p.interval(0.9), p.entropy(), p.mutual_information()))
    assert [tuple(k.shape) for k in kept] == [(n, 1000), (n, 1000), (n, 1000), (n,), (n,)]
    print(peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_moments_and_entropies_of_many_inputs_draws_and_classes_fit_a_gibibyte() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(varify.__file__).parents[1])}
    command = [sys.executable, "-c", MEMORY_OF_A_LOADER]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    before, few, many = map(int, done.stdout.split())
    per_datum = (many - few) / 400
    assert per_datum < 70e3  # mean and interval of 1,000 classes twice are 24 kB; samples would be 400 kB, twice
    assert few - before + 9900 * max(per_datum, 24e3) < 2**30  # of 10,000


# --- bad input


def test_bad_input() -> None:
    vnet = small()
    ensemble, x = vnet.ensemble(2, seed=0), torch.randn(4, 3)
    for n in (0, -1, 2.5):
        with pytest.raises(ArgumentError, match="n_samples must be a positive integer"):
            vnet.ensemble(n)
    with pytest.raises(ArgumentError, match="memory must be an integer of at least 0"):
        vnet.ensemble(2, memory=-1)
    with pytest.raises(ArgumentError, match=r"don't fit into memory .*: give the bytes that they may take"):
        varify.Ensemble(varify.variationalize(nn.Linear(2000, 2000)), range(10**6), 2**62)  # 16 TB
    for index in (slice(1, 3), "0"):
        with pytest.raises(ArgumentError, match=r"ensemble\[i\] is one network, so that i must be an integer"):
            ensemble[index]
    for call in (lambda: vnet.ensemble(2, seed=2**64), lambda: vnet.predict(x, seed=2**64)):
        with pytest.raises(ArgumentError, match=r"seed must be an integer from 0 to 2\*\*64 - 1"):
            call()
    vnet.predict(x, seed=2**64 - 1)
    with pytest.raises(ArgumentError, match="the loader is empty"):
        ensemble.predict_loader([])
    with pytest.raises(ArgumentError, match="a batch of 3 parts may be inputs and targets in several ways"):
        ensemble.predict_loader([(x, x, x)])
    with pytest.raises(ArgumentError, match="a scalar for a whole batch can't be joined"):
        ensemble.predict_loader([x, x], lambda prediction: prediction.mean.sum())
    with pytest.raises(ArgumentError, match=r"shapes \(2,\) \(batch 0\) and \(3,\) \(batch 1\) can't be joined|shapes"):
        ensemble.predict_loader([x, x[:3]], lambda prediction: prediction.mean.T)
    with pytest.raises(ArgumentError, match="the number of draws is n_samples, got num_samples=3"):
        ensemble.predict(x, num_samples=3)


class Changing(nn.Module):
    """Returns a tuple for batches of two."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.fc(x)
        return (y, y) if len(x) == 2 else y


def test_batches_of_another_structure_are_refused_with_both() -> None:
    ensemble, x = varify.variationalize(Changing()).ensemble(2, seed=0), torch.randn(5, 3)
    with pytest.raises(ArgumentError, match=r"batch 1 gave \('Prediction', 'Prediction'\) and batch 0 Prediction"):
        ensemble.predict_loader(x.split(3))
    batches = [torch.randn(2, 4, 3), torch.randn(2, 5, 3)]
    with pytest.raises(
        ArgumentError, match=r"shapes \(2, 4, 2\) \(batch 0\) and \(2, 5, 2\) \(batch 1\) can't be joined"
    ):
        varify.variationalize(nn.Linear(3, 2)).ensemble(2).predict_loader(batches)


# --- files


def test_a_file_gives_the_same_networks(tmp_path: Path) -> None:
    vnet, x = small(), torch.randn(6, 3)
    ensemble = vnet.ensemble(3, seed=0)
    varify.save(ensemble, tmp_path / "ensemble.safetensors")
    plain = nn.Sequential(nn.Linear(3, 8), varify.variationalize(nn.Linear(8, 8)), nn.BatchNorm1d(8), nn.Dropout())
    plain.append(nn.Linear(8, 2))
    loaded = varify.load_ensemble(tmp_path / "ensemble.safetensors", plain, memory=0)
    assert loaded.n_kept == 0
    assert torch.equal(loaded.predict(x).samples, ensemble.predict(x).samples)
    posterior = varify.load(tmp_path / "ensemble.safetensors", plain)
    assert torch.equal(posterior.predict(x, seed=1).samples, vnet.predict(x, seed=1).samples)
    varify.save(vnet, tmp_path / "vnet.safetensors")
    with pytest.raises(varify.FileError, match=r"has no seeds of an ensemble: varify.load\(path, model\).ensemble"):
        varify.load_ensemble(tmp_path / "vnet.safetensors", plain)


def test_copies_predict_alike() -> None:
    ensemble, x = small().ensemble(3, seed=0), torch.randn(6, 3)
    assert torch.equal(copy.deepcopy(ensemble).predict(x).samples, ensemble.predict(x).samples)
    moved = copy.deepcopy(ensemble).to("meta")
    assert moved.predict(x.to("meta"), vectorize=False).samples.device.type == "meta"
