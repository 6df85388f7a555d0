"""Every measure of a prediction against a small case by hand, and its shapes."""

import math

import pytest
import torch
from torch import Tensor, nn

import varify
from tests.networks import CASES, DictOutput, seeded
from varify import Prediction

# two draws, one input, two classes: (0.5, 0.5) and (0.9, 0.1)
TWO = torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]]], dtype=torch.float64)


def h(*p: float) -> float:
    return -sum(x * math.log(x) for x in p if x)


@pytest.mark.parametrize(
    "prediction",
    [
        Prediction(TWO, "probabilities"),
        Prediction(TWO.log() + 3.0),
        Prediction((TWO[..., 1] / TWO[..., 0]).log(), "binary_logits"),
        Prediction(TWO.log().unsqueeze(-1).expand(2, 1, 2, 5), class_dim=1),
    ],
    ids=["probabilities", "logits", "binary", "segmentation"],
)
def test_measures_on_classes_by_hand(prediction: Prediction) -> None:
    def each(x: Tensor) -> Tensor:
        assert torch.equal(x, x.flatten()[0].expand_as(x))
        return x.flatten()[0]

    p = prediction.probabilities()
    class_dim = prediction.class_dim
    assert each(p.select(class_dim, 0)).item() == pytest.approx(0.7)
    assert each(p.select(class_dim, 1)).item() == pytest.approx(0.3)
    assert each(prediction.entropy()).item() == pytest.approx(h(0.7, 0.3))
    information = h(0.7, 0.3) - (h(0.5, 0.5) + h(0.9, 0.1)) / 2
    assert each(prediction.mutual_information()).item() == pytest.approx(information)
    assert each(prediction.variation_ratio()).item() == 0.0


def test_votes_and_certainty() -> None:
    votes = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
    assert Prediction(votes, "probabilities").variation_ratio().item() == pytest.approx(0.5)
    certain = Prediction(torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]), "probabilities")
    assert certain.entropy().item() == 0.0
    assert certain.mutual_information().item() == 0.0


def test_moments_quantiles_and_intervals_equal_numpys() -> None:
    import numpy as np

    torch.manual_seed(0)
    prediction = Prediction(torch.randn(13, 4, 2, dtype=torch.float64))
    values = prediction.samples.numpy()
    torch.testing.assert_close(prediction.mean, torch.as_tensor(values.mean(0)))
    torch.testing.assert_close(prediction.std, torch.as_tensor(values.std(0)))
    for q in (0.0, 0.31, 1.0):
        torch.testing.assert_close(prediction.quantile(q), torch.as_tensor(np.quantile(values, q, axis=0)))
    low, high = prediction.interval(0.9)
    torch.testing.assert_close(low, torch.as_tensor(np.quantile(values, 0.05, axis=0)))
    torch.testing.assert_close(high, torch.as_tensor(np.quantile(values, 0.95, axis=0)))
    assert prediction.quantile(torch.tensor([0.1, 0.5, 0.9])).shape == (3, 4, 2)
    assert Prediction(values_of_one := prediction.samples[:1]).std.eq(0).all()
    assert values_of_one.shape[0] == 1


def test_bad_questions() -> None:
    prediction = Prediction(TWO)
    for level in (0.0, 1.0, -0.1, 95):
        with pytest.raises(ValueError, match=f"level={level}"):
            prediction.interval(level)
    with pytest.raises(ValueError, match=r"q=1.5"):
        prediction.quantile(1.5)
    with pytest.raises(ValueError, match="outputs='logit'"):
        Prediction(TWO, "logit")


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "transformer", "untraceable", "tied"])
def test_a_prediction_is_a_loop_of_forwards_under_the_same_seed(name: str) -> None:
    vnet = varify.variationalize(seeded(CASES[name]).eval())
    args, kwargs = CASES[name].calls[0]
    torch.manual_seed(3)
    prediction = vnet.predict(*args, n_samples=100, **kwargs)
    torch.manual_seed(3)
    with vnet.sampling(), torch.no_grad():
        loop = torch.stack([vnet(*args, **kwargs) for _ in range(100)])
    torch.testing.assert_close(prediction.samples, loop)
    assert prediction.n_samples == 100
    assert not prediction.samples.requires_grad


def test_modes_are_eval_meanwhile_and_restored_even_after_an_exception() -> None:
    vnet = varify.variationalize(seeded(CASES["cnn"])).train()
    vnet.module.drop.eval()
    before = [m.training for m in vnet.modules()]
    statistics = vnet.module.bn1.running_mean.clone()
    vnet.predict(torch.randn(4, 1, 8, 8))
    with pytest.raises(RuntimeError):
        vnet.predict(torch.randn(4, 7, 8, 8))
    assert [m.training for m in vnet.modules()] == before
    assert torch.equal(vnet.module.bn1.running_mean, statistics)


def test_structured_outputs_are_predicted_leaf_by_leaf() -> None:
    vnet = varify.variationalize(DictOutput())
    predicted = vnet.predict({"x": torch.ones(4, 3)}, n_samples=5)
    assert type(predicted).__name__ == "OrderedDict"
    assert predicted["logits"].samples.shape == (5, 4, 2)
    assert predicted["extra"][0].mean.shape == (4, 2)
    assert predicted["extra"][1:] == (None, "a name")
    assert predicted["n"] == 3


def test_a_bayesian_head_alone() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    vnet = varify.variationalize(network, where="1.*")
    assert vnet.predict(torch.ones(1, 3)).std.min() > 0
