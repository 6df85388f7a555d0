"""What a third hard reading found, each held by a test: shapes of one dimension, inputs that a forward writes into."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varify


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x + self.b


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 1, bias=False), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).squeeze(-1) * self.scale


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Factors(nn.Module):
    """Ratings of items by users, each with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.bias = nn.Embedding(9, 4), nn.Parameter(torch.zeros(9))

    def forward(self, user: Tensor) -> Tensor:
        return self.user(user).sum(-1) + self.bias[user]


FLAT: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "a line": (Line, torch.linspace(-1, 1, 6)),
    "a scale": (Scaled, torch.linspace(-1, 1, 18).view(6, 3)),
    "a product": (Product, torch.linspace(-1, 1, 18).view(6, 3)),
    "factors": (Factors, torch.arange(6)),
}


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("estimator", ["auto", "local", "flipout"])
def test_outputs_of_one_dimension(name: str, estimator: str) -> None:
    make, x = FLAT[name]
    vnet = varify.variationalize(make(), where="*", estimator=estimator, init=varify.inits.Constant(0.5))
    vnet(x)
    with torch.no_grad():
        outputs = torch.stack([vnet(x) for _ in range(800)])
        separate = vnet.predict(x, n_samples=800, joint=False).samples
    theta = vnet.predict(x, n_samples=4000).samples
    for found in (outputs, separate):
        # standard errors of a std over 800 and 4,000 draws are 2.5 % and 1.1 %: 5 of them together (10^-5 false alarms)
        torch.testing.assert_close(found.std(0), theta.std(0), rtol=0.14, atol=1e-6)


class Writing(nn.Module):
    """Writes into what it is given."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer or nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1.0)
        return self.layer(x)  # type: ignore[no-any-return]


class Adding(nn.Module):
    """The same, without."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + 1.0)  # type: ignore[no-any-return]


def both() -> tuple[varify.VariationalModule, varify.VariationalModule]:
    writing = varify.variationalize(Writing())
    return writing, varify.variationalize(Adding(writing.module.layer))


@pytest.mark.parametrize(
    "options",
    [{"vectorize": False}, {"vectorize": True}, {}, {"joint": False}, {"linearized": True}, {"gradients": True}],
    ids=str,
)
def test_each_draw_sees_the_inputs_as_they_were_given(options: dict[str, Any]) -> None:
    writing, adding = both()
    adding.load_state_dict(writing.state_dict())
    x = torch.randn(5, 3)
    given = x.clone()
    found = writing.predict(x, n_samples=6, seed=3, **options).samples
    assert torch.equal(x, given)
    torch.testing.assert_close(found, adding.predict(x, n_samples=6, seed=3, **options).samples)


@pytest.mark.parametrize("n_samples", [2, 3])
@pytest.mark.parametrize("bound", ["elbo", "importance_weighted"])
def test_each_sample_of_an_objective_sees_the_same_inputs(n_samples: int, bound: str) -> None:
    writing, adding = both()
    adding.load_state_dict(writing.state_dict())
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    given, losses = x.clone(), []
    for vnet in (writing, adding):
        torch.manual_seed(1)
        elbo = varify.ELBO(num_data=5, n_samples=n_samples, bound=bound)
        losses.append(elbo(vnet, F.cross_entropy, x, y).loss)
    assert torch.equal(x, given)
    torch.testing.assert_close(*losses)


ANALYSES: dict[str, Callable[[varify.VariationalModule, Any], object]] = {
    "fit_sigma": lambda v, data: varify.fit_sigma(v, data, F.cross_entropy, num_data=5),
    "fit_temperature": lambda v, data: varify.fit_temperature(v, data, F.cross_entropy, n_samples=2),
    "description_length": lambda v, data: varify.description_length(v, data, F.cross_entropy),
    "diagnose": lambda v, data: varify.diagnose(v, data, F.cross_entropy, num_data=5),
}


@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_leaves_data_and_buffers(name: str) -> None:
    layer = nn.Sequential(nn.Linear(3, 4), Counting())
    vnet = varify.variationalize(Writing(layer), where="*.0.*").eval()
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    given = x.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ANALYSES[name](vnet, [(x, y)])
    assert torch.equal(x, given)
    assert int(layer_of(vnet).calls) == 0


class Counting(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x


def layer_of(vnet: varify.VariationalModule) -> Counting:
    return next(module for module in vnet.modules() if isinstance(module, Counting))


def test_noise_that_is_written_before_backward_is_told_of() -> None:
    vnet, noise = varify.variationalize(nn.Linear(3, 2), estimator="weights"), {}
    for name, q in vnet.posteriors.items():
        noise[name] = q.noise()
    with vnet.fixed_draw(noise):
        loss = vnet(torch.randn(4, 3)).sum()
        noise["weight"].normal_()
        with pytest.raises(RuntimeError, match="modified"):
            loss.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gauss_newton_of_a_network_in_half_precision(dtype: torch.dtype) -> None:
    net, x, y = nn.Linear(3, 2), torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    sigmas = []
    for kind in (torch.float32, dtype):
        vnet = varify.variationalize(nn.Linear(3, 2))
        vnet.module.load_state_dict(net.state_dict())
        vnet.to(kind)
        varify.fit_sigma(vnet, [(x.to(kind), y)], F.cross_entropy, num_data=6, curvature="ggn")
        sigmas.append(vnet.posteriors["weight"].sigma.float())
    torch.testing.assert_close(*sigmas, rtol=0.05, atol=0.0)


@pytest.mark.parametrize("analysis", ["fit_sigma", "description_length"])
def test_a_batch_that_is_not_the_first_dimension_is_refused(analysis: str) -> None:
    vnet = varify.variationalize(nn.Linear(3, 2), batch_dim=1)
    data = [(torch.randn(7, 4, 3), torch.tensor([0, 1, 0, 1]))]
    with pytest.raises(varify.ArgumentError, match="batch_dim=1"):
        ANALYSES[analysis](vnet, data)


def test_data_that_are_no_numbers_are_told_of() -> None:
    vnet = varify.variationalize(nn.Linear(3, 2))
    before = {name: q.rho.clone() for name, q in vnet.posteriors.items()}
    data = [(torch.full((4, 3), torch.nan), torch.tensor([0, 1, 0, 1]))]
    with pytest.raises(varify.ArgumentError, match=r"weight.* not finite"):
        varify.fit_sigma(vnet, data, F.cross_entropy, num_data=4)
    assert all(torch.equal(q.rho, before[name]) for name, q in vnet.posteriors.items())
    diagnosis = varify.diagnose(vnet, data, F.cross_entropy, num_data=4)
    (found,) = [finding for finding in diagnosis.findings if finding.name == "not-finite-loss"]
    assert found.severity == "error"
    assert "inputs and outputs" in found.message or "inputs, outputs" in found.message


def test_weights_that_are_no_numbers_are_warned_of() -> None:
    net = nn.Linear(3, 2)
    net.weight.data[0, 1] = torch.nan
    with pytest.warns(varify.VarifyWarning, match="weight have NaN"):
        varify.variationalize(net)
