"""torch.compile of a variational network and of its objective; torch.export of its mean."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varify
from tests.networks import CASES, seeded
from tests.test_machinery import assert_gradients, data, gradients, mlp, without_noise

# torch's compiler uses what torch has deprecated
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


class Mixed(nn.Module):
    """Convolution, BatchNorm, a loop, a raw parameter, an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> dict[str, Tensor]:
        x = F.relu(self.bn(self.conv(x))).mean((2, 3)) * self.scale
        for _ in range(2):
            x = torch.tanh(self.fc(x))
        return {"out": x if shift is None else x + shift}


PRIORS: dict[str, Any] = {
    "gaussian": "gaussian",
    "conjugate": varify.priors.Conjugate(0.0, 3.0, 0.5, 0.7),
    "known mean": varify.priors.ConjugateKnownMean(0.0, 0.5, 0.5),
    "mixture": varify.priors.ScaleMixture(1.0, 0.1, 0.5),
    "laplace": torch.distributions.Laplace(0.0, 0.1),
}


def test_a_compiled_network_has_the_outputs_and_gradients_of_the_original() -> None:
    torch.manual_seed(0)
    vnet = without_noise(varify.variationalize(Mixed()))
    plain = vnet.mean_model()
    compiled = torch.compile(vnet, fullgraph=True)
    x = torch.randn(5, 1, 6, 6)
    for training in (True, False):
        for kwargs in ({}, {"shift": torch.ones(4)}):
            plain.train(training)
            compiled.train(training)
            found, expected = compiled(x, **kwargs)["out"], plain(x, **kwargs)["out"]
            torch.testing.assert_close(found, expected)
            grads = gradients(plain, (expected**2).sum())
            mine = gradients(vnet, (found**2).sum())
            assert_gradients({n: mine[f"module.{n}"] for n in grads}, grads)
    torch.testing.assert_close(plain.bn.running_mean, vnet.module.bn.running_mean)
    assert plain.bn.num_batches_tracked == vnet.module.bn.num_batches_tracked == 2


def test_a_compiled_network_draws_from_its_posterior() -> None:
    # outputs of a linear map are Gaussian with known moments; 4000 draws, tolerance 5 standard errors: a false alarm
    # in about 10^6 runs for each of the 12 figures
    torch.manual_seed(0)
    vnet = varify.variationalize(nn.Linear(3, 2), init=varify.inits.Constant(0.5))
    compiled = torch.compile(vnet, fullgraph=True)
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    with torch.no_grad():
        draws = torch.stack([compiled(x) for _ in range(4000)])
    std = 0.5 * torch.sqrt((x**2).sum(1) + 1).unsqueeze(1).expand(3, 2)
    assert ((draws.mean(0) - vnet.module(x)).abs() < 5 * std / 4000**0.5).all()
    assert ((draws.std(0) - std).abs() < 5 * std / 8000**0.5).all()
    torch.manual_seed(1)
    one = compiled(x)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), one)
    assert not torch.equal(compiled(x), one)


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS.keys())
def test_a_compiled_step_of_the_whole_objective(prior: Any) -> None:
    vnet = without_noise(mlp(prior="gaussian")) if prior == "gaussian" else mlp(prior=prior)
    x, y = data()

    def objective(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(vnet(x), y), vnet.prior_loss()

    compiled = torch.compile(objective, fullgraph=True)
    if prior == "gaussian":
        nll, kl = compiled(x, y)
        eager_nll, eager_kl = objective(x, y)
        torch.testing.assert_close((nll, kl), (eager_nll, eager_kl), rtol=1e-5, atol=1e-4)
        found = gradients(vnet, nll + kl / 100)
        assert_gradients(found, gradients(vnet, eager_nll + eager_kl / 100), 1e-3)
        return
    # an estimate: its mean over 300 draws against that of the eager one, within 5 standard errors (10^-6 false alarms)
    with torch.no_grad():
        found, expected = (torch.stack([f(x, y)[1] for _ in range(300)]) for f in (compiled, objective))
    error = ((found.var() + expected.var()) / 300).sqrt()
    assert (found.mean() - expected.mean()).abs() < 5 * error + 1e-3


def test_training_with_a_compiled_network() -> None:
    vnet = mlp(init=varify.inits.Constant(0.01))
    compiled = torch.compile(vnet, fullgraph=True)
    optimizer = torch.optim.Adam(vnet.parameters(), lr=0.05)
    x, _ = data(64)
    y = (x[:, 0] > 0).long()
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(compiled(x), y) + vnet.prior_loss() / 1e4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert set(compiled.state_dict()) == {f"_orig_mod.{name}" for name in vnet.state_dict()}


def test_a_compiled_network_with_estimators_draws_weights_and_strict_says_so() -> None:
    x, _ = data()
    vnet = mlp(estimator="local")
    assert torch.compile(vnet, fullgraph=True)(x).shape == (16, 2)
    with pytest.raises(Exception, match=r"strict=True: under torch\.compile weights are drawn"):
        torch.compile(mlp(estimator="local", strict=True), fullgraph=True)(x)


def test_the_mean_model_exports() -> None:
    vnet = varify.variationalize(seeded(CASES["cnn"])).eval()
    x = torch.randn(4, 1, 8, 8)
    exported = torch.export.export(vnet.mean_model(), (x,))
    torch.testing.assert_close(exported.module()(x), vnet(x))


def test_a_compiled_network_with_a_shared_module_and_a_tied_weight() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b, self.c = self.a, nn.Linear(3, 3)
            self.c.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.tanh(self.b(self.a(x))))

    torch.manual_seed(0)
    vnet = varify.variationalize(Network(), init=varify.inits.Constant(0.5))
    kept = [vnet.module.a.weight, vnet.module.a.bias, vnet.module.c.bias]
    x = torch.randn(4, 3)
    output = torch.compile(vnet, fullgraph=True)(x)
    assert all(a is b for a, b in zip(kept, vnet.parameters(), strict=False))
    w = torch.autograd.grad(output.sum(), [vnet.rho.leaf_at("a.weight"), vnet.rho.leaf_at("c.bias")])
    assert all(grad.any() for grad in w)
    with vnet.fixed_draw():
        drawn = vnet.sample_model()
        torch.testing.assert_close(torch.compile(vnet, fullgraph=True)(x), drawn(x))
