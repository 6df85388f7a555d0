"""What can't be converted is refused in words that say what to do, and nothing has changed."""

import copy

import pytest
import torch
from torch import nn

import varify


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Parameter(torch.ones(3, dtype=torch.long), requires_grad=False)
        self.complex = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.sparse = nn.Parameter(torch.eye(3).to_sparse())
        self.nowhere = nn.Parameter(torch.empty(3, device="meta"))


MODELS = {
    "a class": (
        lambda: nn.Linear,
        r"model must be an nn.Module, got <class .*Linear'>: pass an instance, Linear\(\.\.\.\)",
    ),
    "a number": (lambda: 3, "model must be an nn.Module, got int"),
    "variational": (lambda: varify.variationalize(nn.Linear(2, 2)), r"variational already; convert its .module"),
    "DataParallel": (lambda: nn.DataParallel(nn.Linear(2, 2)), "wrapped in DataParallel; convert model.module"),
    "compiled": (lambda: torch.compile(nn.Linear(2, 2)), "convert model._orig_mod and torch.compile the result"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize(("make", "told"), MODELS.values(), ids=MODELS.keys())
def test_models_that_are_refused(make: object, told: str) -> None:
    with pytest.raises(varify.ModelError, match=told):
        varify.variationalize(make())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused() -> None:
    with pytest.raises(varify.ModelError, match="convert the Python module that it was made from"):
        varify.variationalize(torch.jit.script(nn.Linear(2, 2)))


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_module_must_have_been_run() -> None:
    network = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(
        varify.ModelError, match=r"0.weight, 0.bias of a lazy module have no shape yet; call the model once"
    ):
        varify.variationalize(network)
    network(torch.ones(1, 2))
    assert varify.variationalize(network).posteriors["0.weight"].mu.shape == (3, 2)


def test_nothing_chosen() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    for where, told in (
        ("fc9*", r"where='fc9\*' matches no parameter that can be variational; this model has 0.weight \(not chosen\)"),
        (lambda name, parameter, owner: False, "matches no parameter"),
        ([], "matches no parameter"),
        (3, "where must be a glob on parameter names, .*, got 3"),
        (network[0], "a glob on parameter names"),
        (["0.*", "nope"], "where='nope' matches no parameter; there are 0.weight"),
        ("0", r"for the layer, write '0.\*'"),
    ):
        with pytest.raises(varify.SelectionError, match=told):
            varify.variationalize(network, where=where)
    with pytest.raises(varify.SelectionError, match="the model has no parameters"):
        varify.variationalize(nn.ReLU())
    network.requires_grad_(False)
    with pytest.raises(varify.SelectionError, match=r"say where=\.\.\. to choose from 0.weight \(frozen\)"):
        varify.variationalize(network)
    with pytest.raises(varify.SelectionError, match=r"the glob 'conv\*' matches no parameter; there are 0.weight"):
        varify.variationalize(nn.Sequential(nn.Linear(2, 2)), prior={"conv*": "gaussian"})


def test_parameters_that_can_not_be_variational_are_left_and_named() -> None:
    reasons = ("integer", "complex", "sparse", "on the meta device")
    with pytest.raises(varify.SelectionError) as told:
        varify.variationalize(Odd(), where="*")
    for name, reason in zip(("whole", "complex", "sparse", "nowhere"), reasons, strict=True):
        assert f"{name} ({reason})" in str(told.value)
    network = Odd()
    network.fc = nn.Linear(3, 2)
    network.forward = lambda x: network.fc(x)
    vnet = varify.variationalize(network, where="*")
    assert list(vnet.posteriors) == ["fc.weight", "fc.bias"]
    for reason in reasons:
        assert reason in str(vnet.summary())


@pytest.mark.parametrize(
    ("init", "told"),
    [
        (
            "xavier",
            r"init must be a varify.inits.Init or one of of_weights, .*, zero_mean, normal, moped, got 'xavier'",
        ),
        (3, "init must be .*, got 3"),
    ],
)
def test_bad_initializations(init: object, told: str) -> None:
    with pytest.raises(varify.InitError, match=told):
        varify.variationalize(nn.Linear(2, 2), init=init)


def test_bad_numbers_in_initializations() -> None:
    for make, told in (
        (lambda: varify.inits.Constant(0.0), "sigma must be a positive number, got 0.0"),
        (lambda: varify.inits.Relative(-1), "scale must be a positive number, got -1"),
        (lambda: varify.inits.Moped(delta=float("inf")), "delta must be a positive number, got inf"),
        (lambda: varify.inits.Normal(rho=(-3.0, -0.1)), "rho must be"),
    ):
        with pytest.raises(varify.InitError, match=told):
            make()


def test_a_refused_conversion_leaves_the_network_alone() -> None:
    network = nn.Linear(3, 2)
    before = copy.deepcopy(network.state_dict())
    for options in ({"prior": "nose"}, {"prior": varify.priors.Gaussian(std=torch.ones(7))}, {"init": "nose"}):
        with pytest.raises(varify.VarifyError):
            varify.variationalize(network, **options)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.requires_grad for p in network.parameters())


def test_bad_predictions() -> None:
    vnet = varify.variationalize(nn.Linear(3, 2))
    for n_samples in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=f"n_samples must be a positive integer, got {n_samples}"):
            vnet.predict(torch.ones(1, 3), n_samples=n_samples)


def test_a_weight_of_the_kl_needs_a_kl() -> None:
    x, y, network = torch.ones(4, 3), torch.tensor([0, 1, 0, 1]), nn.Linear(3, 2)
    for call in (
        lambda: varify.ELBO(num_data=4, beta="auto")(network, nn.functional.cross_entropy, x, y),
        lambda: varify.kl_weight(network, 4),
    ):
        with pytest.raises(varify.ModelError, match="no variational parts, so there is no KL"):
            call()
