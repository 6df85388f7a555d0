"""What a newcomer writes by mistake is refused in words that name the fact and the way out, or just works."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import varify
from varify import ELBO, Prediction


@pytest.fixture
def vnet() -> varify.VariationalModule:
    return varify.variationalize(nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 3)))


X, Y = torch.linspace(-2, 2, 120).reshape(30, 4), torch.arange(30) % 3


MEASURES = {
    "entropy": lambda p: p.entropy(),
    "nll": lambda p: p.nll(Y),
    "ece": lambda p: p.ece(Y),
    "probabilities": lambda p: p.probabilities(),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())
def test_logits_said_to_be_probabilities_are_refused(vnet: varify.VariationalModule, measure: Any) -> None:
    prediction = vnet.predict(X, outputs="probabilities", n_samples=3)
    assert prediction.mean.isfinite().all()  # a measure on no classes
    with pytest.raises(varify.ArgumentError, match=r"outputs='probabilities', but an output has a value of -.*leave"):
        measure(prediction)
    with pytest.raises(varify.ArgumentError, match=r"has classes whose sum is .* away from 1"):
        measure(Prediction(prediction.samples.abs(), "probabilities"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounded_probabilities_are_probabilities(dtype: torch.dtype) -> None:
    p = torch.randn(5, 30, 300).softmax(-1)
    assert Prediction(p.to(dtype), "probabilities").entropy().isfinite().all()


def test_a_softmax_at_the_end_is_told_and_logits_are_not() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1))
    prediction = varify.variationalize(net).predict(X, n_samples=3)
    with pytest.warns(varify.VarifyWarning, match="say outputs='probabilities'"):
        prediction.entropy()
    for logits in (prediction.samples.log(), prediction.samples + 0.1, prediction.samples[:, :0]):
        Prediction(logits).entropy()  # a warning is an error here


def test_no_data_have_no_scores(vnet: varify.VariationalModule) -> None:
    prediction = vnet.predict(X[:0], n_samples=2)
    for score in (prediction.accuracy, prediction.ece, prediction.nll, prediction.brier):
        assert score(Y[:0]).isnan()


def test_targets_are_what_as_tensor_takes(vnet: varify.VariationalModule) -> None:
    prediction = vnet.predict(X, n_samples=3)
    for score in (prediction.nll, prediction.accuracy, prediction.ece, prediction.brier):
        assert score(Y.tolist()) == score(Y.numpy()) == score(Y)
    targets, likelihood = torch.zeros(30, 3), varify.GaussianLikelihood()
    for score in (prediction.nll, prediction.crps, lambda y, like: prediction.coverage(y, 0.9, like)):
        assert score(targets.tolist(), likelihood) == score(targets.numpy(), likelihood) == score(targets, likelihood)


def test_a_tensor_is_no_loader(vnet: varify.VariationalModule) -> None:
    ensemble = vnet.ensemble(2)
    with pytest.raises(varify.ArgumentError, match=r"a tensor of shape \(30, 4\).*ensemble.predict.*DataLoader"):
        ensemble.predict_loader(X)
    assert ensemble.predict_loader(DataLoader(X, batch_size=7)).samples.shape == (2, 30, 3)


@pytest.mark.parametrize("name", ["nsamples", "N_samples", "num_sample", "ndraws"])
def test_misspelled_numbers_of_draws(vnet: varify.VariationalModule, name: str) -> None:
    with pytest.raises(varify.ArgumentError, match=f"the number of draws is n_samples, got {name}=3"):
        vnet.predict(X, **{name: 3})


def test_words_where_booleans_and_numbers_are_meant(vnet: varify.VariationalModule) -> None:
    for name in ("joint", "linearized", "gradients"):
        with pytest.raises(varify.ArgumentError, match=f"{name} must be one of True, False, got 'no'"):
            vnet.predict(X, **{name: "no"})
    for prediction in (vnet.predict(X, n_samples=2), vnet.propagate(X)):
        with pytest.raises(varify.ArgumentError, match=r"level must lie within \(0, 1\), got 'a'"):
            prediction.interval("a")


# --- criteria

LOADER = DataLoader(TensorDataset(X, Y), batch_size=10)
USES = {
    "ELBO": lambda vnet, criterion: ELBO(num_data=30)(vnet, criterion, X, Y),
    "fit_sigma": lambda vnet, criterion: varify.fit_sigma(vnet, LOADER, criterion, num_data=30),
    "fit_temperature": lambda vnet, criterion: varify.fit_temperature(vnet, LOADER, criterion),
    "description_length": lambda vnet, criterion: varify.description_length(vnet, LOADER, criterion),
    "diagnose": lambda vnet, criterion: varify.diagnose(vnet, LOADER, criterion),
}
WRONG = {
    "a class": (nn.CrossEntropyLoss, r"CrossEntropyLoss is a class: pass an instance, CrossEntropyLoss\(\)"),
    "a name": ("cross_entropy", r"must be a function of \(output, targets\), such as F.cross_entropy, got 'cross_ent"),
    "inputs": (X, r"got a Tensor.*order of the arguments"),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize(("criterion", "told"), WRONG.values(), ids=WRONG.keys())
def test_what_is_no_criterion(vnet: varify.VariationalModule, use: Any, criterion: Any, told: str) -> None:
    with pytest.raises(varify.ArgumentError, match=told):
        use(vnet, criterion)


class OfStructure(nn.Linear):
    """Returns what networks of transformers do: something that has logits."""

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=super().forward(x))


def test_an_output_that_has_logits_is_hinted_at() -> None:
    vnet = varify.variationalize(OfStructure(4, 3), estimator="weights")
    elbo = ELBO(num_data=30)
    with pytest.raises(varify.ArgumentError, match=r"returns a SimpleNamespace.*lambda output, y: .*output\.logits"):
        elbo(vnet, F.cross_entropy, X, Y)
    assert elbo(vnet, lambda output, y: F.cross_entropy(output.logits, y), X, Y).loss.isfinite()

    def own(output: Any, y: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        elbo(vnet, own, X, Y)


# --- networks


def test_parameters_without_values_can_not_be_chosen() -> None:
    with torch.device("meta"):
        net = nn.Linear(4, 3)
    for where in (None, "weight"):
        with pytest.raises(
            varify.SelectionError, match=r"on the meta device: load them or call to_empty.*then convert"
        ):
            varify.variationalize(net, where=where)


def test_a_file_of_other_classes_tells_both_shapes(tmp_path: Any) -> None:
    varify.save(varify.variationalize(nn.Sequential(nn.Linear(4, 10))), tmp_path / "a")
    with pytest.raises(varify.StructureError, match=r"0\.weight is \(5, 4\) here, \(10, 4\) in the file"):
        varify.load(tmp_path / "a", nn.Sequential(nn.Linear(4, 5)))
    with pytest.raises(varify.StructureError, match=r"this Sequential has no 0\.weight"):
        varify.load(tmp_path / "a", nn.Sequential(nn.ReLU(), nn.Linear(4, 10)))
