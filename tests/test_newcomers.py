"""What people stumble over in their first hour: each mistake is told from a result, and each tool takes the result."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as td
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import varify
from varify import ELBO, Prediction, schedules
from varify.weights import kl


class PerWeight(varify.priors.Prior):
    """Forgets to sum."""

    def log_prob(self, w: Tensor) -> Tensor:
        return -w.square()


def vnet_of(**options: Any) -> varify.VariationalModule:
    torch.manual_seed(0)
    return varify.variationalize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), **options)


@pytest.mark.parametrize(
    "use",
    [
        lambda vnet: vnet.prior_loss(),
        lambda vnet: vnet.summary(),
        lambda vnet: ELBO(num_data=9)(vnet, F.cross_entropy, torch.ones(2, 4), torch.tensor([0, 1])),
        lambda vnet: ELBO(num_data=9, bound="importance_weighted")(
            vnet, F.cross_entropy, torch.ones(2, 4), torch.tensor([0, 1])
        ),
    ],
    ids=["prior_loss", "summary", "elbo", "importance weighted"],
)
def test_a_log_prob_that_forgets_to_sum_is_refused(use: Any) -> None:
    told = r"PerWeight\.log_prob must return a scalar, .* got shape \(8, 4\): add \.sum\(\)"
    with pytest.raises(varify.PriorError, match=told):
        use(vnet_of(prior=PerWeight()))


def test_a_kl_rule_that_forgets_to_sum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl, "_RULES", dict(kl._RULES))
    varify.register_kl(varify.GaussianPosterior, PerWeight)(lambda q, p: q.sigma)
    with pytest.raises(varify.PriorError, match=r"the KL rule of PerWeight must return a scalar, .*: add \.sum\(\)"):
        vnet_of(prior=PerWeight()).prior_loss()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: varify.priors.Gaussian(std=p),
        lambda p: varify.priors.ScaleMixture(p, 0.1, 0.5),
        lambda p: varify.priors.Conjugate(0.0, p, 0.5, 0.5),
        lambda p: varify.priors.as_prior(td.Laplace(0.0, p)),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_parameter_as_a_hyperparameter_is_no_silent_constant(make: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        varify.PriorError,
        match=r"requires a gradient, and hyper-parameters are constants: pass .*detach|one number is shared",
    ):
        make(nn.Parameter(torch.ones(shape)))


def test_predictions_with_a_learned_likelihood_carry_no_graph() -> None:
    prediction = vnet_of().predict(torch.ones(5, 4), n_samples=3)
    likelihood = varify.GaussianLikelihood()
    low, high = prediction.interval(0.9, likelihood)
    coverage = prediction.coverage(torch.zeros(5, 3), 0.9, likelihood)
    for found in (low, high, coverage, *prediction.variances(likelihood), prediction.variances(likelihood).total):
        assert found.numpy() is not None


def test_one_output_a_datum_is_not_taken_for_classes() -> None:
    prediction = Prediction(torch.randn(7, 5))
    for measure in (Prediction.entropy, Prediction.probabilities, Prediction.mutual_information):
        with pytest.raises(varify.ArgumentError, match=r"outputs of shape \(5,\) have one dimension, .*binary_logits"):
            measure(prediction)
    assert Prediction(prediction.samples, "binary_logits").entropy().shape == (5,)
    assert Prediction(prediction.samples, class_dim=0).entropy().shape == ()


def test_a_state_dict_is_of_tensors_alone_and_passes_through_safetensors(tmp_path: Path) -> None:
    vnet = vnet_of(
        prior={"0.*": varify.priors.ScaleMixture(1.0, torch.full((8, 1), 0.1), 0.5), "2.*": td.Laplace(0.0, 0.1)}
        if False
        else {"0.weight": varify.priors.ScaleMixture(1.0, torch.full((8, 1), 0.1), 0.5)}
    )
    varify.prune(vnet, 0.2)
    state = vnet.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    save_file(state, tmp_path / "a")
    other = vnet_of()
    other.load_state_dict(load_file(tmp_path / "a"))
    assert torch.equal(other.state_dict()["_extra_state"], state["_extra_state"])
    assert str(other.summary()).splitlines()[0] == str(vnet.summary()).splitlines()[0]
    assert repr(other.posteriors["0.weight"].prior) == repr(vnet.posteriors["0.weight"].prior)


def test_an_average_of_state_dicts_that_spoils_integers_says_so() -> None:
    vnet = vnet_of()
    state = dict(vnet.state_dict())
    loaded = vnet_of()
    loaded.load_state_dict({k: v.float() if k == "_extra_state" else v for k, v in state.items()})  # as an average does
    state["_extra_state"] = state["_extra_state"] // 2
    with pytest.raises(varify.StructureError, match=r"the checkpoint's extra state .* integers alone"):
        vnet.load_state_dict(state)


def test_a_summary_has_a_line_for_each_parameter_whatever_its_prior_prints() -> None:
    mixture = td.MixtureSameFamily(td.Categorical(torch.tensor([0.3, 0.7])), td.Normal(torch.zeros(2), torch.ones(2)))
    table = str(vnet_of(prior=mixture).summary()).splitlines()
    assert len(table) == 2 + 4 + 1
    assert all("MixtureSameFamily" in line for line in table[2:-1])


def test_an_elbo_without_variational_parts_is_refused() -> None:
    x, y = torch.ones(2, 4), torch.tensor([0, 1])
    with pytest.raises(varify.ModelError, match=r"the Linear has no variational parts, .* varify\.variationalize"):
        ELBO(num_data=9)(nn.Linear(4, 3), F.cross_entropy, x, y)


@pytest.mark.parametrize("beta", ["warm_up", None, -1.0, float("inf"), float("nan")])
def test_a_beta_that_is_no_number_is_refused(beta: Any) -> None:
    with pytest.raises(varify.ArgumentError, match=r"beta must be 'auto', a number of at least 0, or .* got"):
        ELBO(num_data=9, beta=beta)


def test_numbers_of_numpy_are_numbers() -> None:
    x, y = torch.ones(2, 4), torch.tensor([0, 1])
    elbo = ELBO(num_data=np.int64(9), n_samples=np.int32(2), beta=np.float32(0.5))
    assert elbo(vnet_of(), F.cross_entropy, x, y).loss.isfinite()
    assert vnet_of().predict(x, n_samples=np.int64(3)).n_samples == 3
    for wrong in (np.bool_(True), np.float64(3.0), "3", 3.0, None):
        with pytest.raises(varify.ArgumentError, match="n_samples must be a positive integer, got"):
            ELBO(num_data=9, n_samples=wrong)


def test_an_elbo_prints_what_it_is() -> None:
    assert repr(ELBO(num_data=9, beta=1.0)) == "ELBO(num_data=9, n_samples=1, beta=1.0, bound='elbo')"
    elbo = ELBO(num_data=9)
    assert "beta='auto' (by data for each variational weight, see kl_weight: known at the first call)" in repr(elbo)
    elbo(vnet_of(), F.cross_entropy, torch.ones(2, 4), torch.tensor([0, 1]))
    assert f"see kl_weight: {0.03 * (9 / 67) ** 0.5:.6f}" in repr(elbo)
    assert "beta=warm_up(10, end=1.0)" in repr(ELBO(num_data=9, beta=schedules.warm_up(10)))
    for made in (schedules.uniform(3), schedules.blundell(3), schedules.cyclical(8, end=0.5)):
        assert made(0) == eval(f"schedules.{made!r}")(0)


def test_other_names_of_the_number_of_draws_are_told_its_name() -> None:
    with pytest.raises(varify.ArgumentError, match="the number of draws is n_samples, got num_samples=3"):
        vnet_of().predict(torch.ones(2, 4), num_samples=3)

    class Takes(nn.Linear):
        def forward(self, x: Tensor, num_samples: int = 1) -> Tensor:
            return super().forward(x) * num_samples

    assert varify.variationalize(Takes(4, 3)).predict(torch.ones(2, 4), num_samples=3).samples.shape == (32, 2, 3)


def test_a_parameter_that_was_deleted_is_named() -> None:
    vnet = vnet_of()
    vnet.prior_loss()
    del vnet.module[0].weight
    with pytest.raises(varify.StructureError, match=r"the parameter 'weight' of vnet\.module was deleted"):
        vnet.prior_loss()


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf"), torch.ones(7)])
def test_a_weight_std_that_is_none_is_refused(std: Any) -> None:
    class Odd(varify.priors.Gaussian):
        def stddev(self) -> Any:
            return std

        def for_parameter(self, w: Tensor, fan_in: int) -> "Odd":
            return self

    with pytest.raises(varify.PriorError, match=r"0\.weight: stddev of .* must be None, or positive, finite"):
        vnet_of(prior={"0.weight": Odd(std=1.0)})


def test_predictions_compare() -> None:
    samples = torch.randn(3, 2, 4)
    one = Prediction(samples)
    assert one == Prediction(samples.clone())
    assert one != Prediction(samples + 1)
    assert one != Prediction(samples, class_dim=1)
    assert one != Prediction(samples[:2])
    assert one != 3
    assert len({one, Prediction(samples.clone())}) == 1


def test_no_error_lists_a_private_name() -> None:
    for wrong in ("distribution", "nose", 3):
        with pytest.raises(varify.PriorError) as caught:
            vnet_of(prior=wrong)
        assert "distribution," not in str(caught.value)
        assert "gaussian, mixtgauss" in str(caught.value) or "conjugate" in str(caught.value)
