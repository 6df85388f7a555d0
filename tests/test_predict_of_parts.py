"""`varify.predict`: a plain network with variational parts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import varify


class Body(nn.Module):
    """Two Bayesian heads on a plain body with BatchNorm and dropout; forward counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.first = varify.variationalize(nn.Linear(8, 2))
        self.second = varify.variationalize(nn.Linear(8, 4))
        self.calls = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        self.calls += 1
        hidden = self.body(x)
        return {"first": self.first(hidden), "second": scale * self.second(hidden), "name": "a"}


def network() -> Body:
    torch.manual_seed(0)
    return Body().train()


def test_draws_are_those_of_a_loop() -> None:
    net, x = network(), torch.randn(5, 3)
    modes = [m.training for m in net.modules()]
    statistics = net.body[1].running_mean.clone()
    torch.manual_seed(1)
    found = varify.predict(net, x, scale=2.0, n_samples=7)
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(net.body[1].running_mean, statistics)
    assert net.calls == 0
    net.eval()
    torch.manual_seed(1)
    loop = []
    for _ in range(7):
        with torch.no_grad():
            hidden = net.body(x)
            theta = [net.first.sample_model(), net.second.sample_model()]
            loop.append((theta[0](hidden), 2 * theta[1](hidden)))
    torch.testing.assert_close(found["first"].samples, torch.stack([first for first, _ in loop]))
    torch.testing.assert_close(found["second"].samples, torch.stack([second for _, second in loop]))
    assert found["name"] == "a"
    assert found["second"].probabilities().shape == (5, 4)
    assert not found["first"].samples.requires_grad


def test_a_variational_module_predicts_itself() -> None:
    vnet, x = varify.variationalize(nn.Linear(3, 1)), torch.randn(5, 3)
    both = []
    for predict in (vnet.predict, lambda *a, **k: varify.predict(vnet, *a, **k)):
        torch.manual_seed(1)
        both.append(predict(x, n_samples=4, outputs="binary_logits", vectorize=False))
    assert both[0] == both[1]


def test_what_can_not_be_is_refused() -> None:
    with pytest.raises(varify.ModelError, match="the Linear has no variational parts"):
        varify.predict(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(varify.ArgumentError, match="n_samples must be a positive integer, got 0"):
        varify.predict(network(), torch.zeros(2, 3), n_samples=0)
    with pytest.raises(varify.ArgumentError, match="the number of draws is n_samples, got num_samples=3"):
        varify.predict(network(), torch.zeros(2, 3), num_samples=3)
