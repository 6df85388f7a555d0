"""Pairs of opposite noise in ELBO: what they are, that the nll stays unbiased, and that its variance goes down."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import varify

X, Y = torch.linspace(-1, 1, 12).reshape(6, 2), torch.linspace(1, 0, 6).reshape(6, 1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))


def converted(**settings: str) -> varify.VariationalModule:
    settings = {"estimator": "weights", "init": varify.inits.Constant(0.2), **settings}
    return varify.variationalize(network(), **settings).train()


def gradient(vnet: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(), list(vnet.parameters()))])


@pytest.mark.parametrize("n_samples", [2, 5])
def test_draws_come_in_pairs_around_the_means(n_samples: int) -> None:
    vnet, seen = converted(), []
    vnet.module[0].register_forward_hook(lambda module, *_: seen.append(module.weight.detach().clone()))
    varify.ELBO(num_data=6, n_samples=n_samples)(vnet, F.mse_loss, X, Y)
    assert len(seen) == n_samples
    mean = vnet.module[0].weight.detach()
    for first, second in zip(seen[0 : n_samples - 1 : 2], seen[1::2], strict=True):
        torch.testing.assert_close(first + second, 2 * mean)
        assert not torch.equal(first, mean)
    assert len({float(w.sum()) for w in seen}) == n_samples
    assert vnet.drawing.noise is None


def test_the_gradient_is_unbiased_and_has_less_variance_than_that_of_independent_draws() -> None:
    vnet, elbo = converted(), varify.ELBO(num_data=6, n_samples=2)
    torch.manual_seed(1)
    pairs = torch.stack([gradient(vnet, lambda: elbo(vnet, F.mse_loss, X, Y).nll) for _ in range(600)])
    independent = torch.stack(
        [
            gradient(vnet, lambda: torch.stack([F.mse_loss(vnet(X), Y), F.mse_loss(vnet(X), Y)]).mean())
            for _ in range(600)
        ]
    )
    difference = pairs.mean(0) - independent.mean(0)
    error = ((pairs.var(0) + independent.var(0)) / 600).sqrt()
    assert (difference.abs() < 5 * error).all()  # false alarm: 34 numbers of 6e-7, one run in 50,000
    means = sum(p.numel() for p in vnet.module.parameters())
    ratio = pairs[:, :means].var(0).sum() / independent[:, :means].var(0).sum()
    assert ratio < 0.7  # of a linear gradient nothing would be left


@pytest.mark.parametrize("estimator", ["local", "flipout", "auto"])
def test_other_estimators_keep_their_own_noise(estimator: str) -> None:
    vnet, outputs = converted(estimator=estimator), []

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        outputs.append(output.detach())
        return F.mse_loss(output, target)

    elbo = varify.ELBO(num_data=6, n_samples=2)
    for _ in range(2):
        elbo(vnet, criterion, X, Y)
    assert not torch.allclose(outputs[2], outputs[3])
    assert set(vnet.engine.plans)  # it was no call with fixed draws


def test_a_fixed_draw_stays_as_it_is() -> None:
    vnet, elbo = converted(), varify.ELBO(num_data=6, n_samples=2)
    with vnet.fixed_draw():
        torch.testing.assert_close(elbo(vnet, F.mse_loss, X, Y).nll, F.mse_loss(vnet(X), Y))


def test_a_part_in_a_checkpoint_has_the_gradient_of_its_own_draw() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = converted()

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return output

    outer, drawn = Outer().train(), []
    outer.inner.module[0].register_forward_pre_hook(lambda module, *_: drawn.append(module.weight.detach().clone()))
    varify.ELBO(num_data=6, n_samples=2)(outer, F.mse_loss, X, Y).nll.backward()
    forward, again = drawn[:2], drawn[2:]
    assert {float(w.sum()) for w in forward} == {float(w.sum()) for w in again}


def test_fixed_noise_ends_with_its_context_in_whatever_order_they_end() -> None:
    drawing = converted().drawing
    first, second = drawing.fixed({}), drawing.fixed({"a": torch.zeros(1)})
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert drawing.noise is not None
    assert "a" in drawing.noise
    second.__exit__(None, None, None)
    assert drawing.noise is None
