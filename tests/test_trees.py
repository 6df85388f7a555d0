"""What is kept beside the parameters stands under their names, whatever these are."""

import copy

import pytest
import torch
from torch import Tensor, nn

import varify
from varify.network.tree import Tree

NAMES = ["put_leaf", "leaf_at", "_apply", "train", "parameters", "type", "half", "state_dict", "extra_repr"]


class Named(nn.Module):
    """Its layers are called like methods, which setattr() allows, and its parameter like one where torch allows it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.attr = "scale" if hasattr(nn.Module, name) else name
        self.inner = nn.Sequential(nn.Linear(3, 3))
        setattr(self.inner, name, nn.Linear(3, 3))
        setattr(self, self.attr, nn.Parameter(torch.ones(3)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner._modules.values():
            x = layer(x)
        return x * self._parameters[self.attr]


@pytest.mark.parametrize("name", NAMES)
def test_layers_and_parameters_may_be_called_like_methods(name: str) -> None:
    vnet, x = varify.variationalize(Named(name)), torch.randn(2, 3)
    chosen = {vnet.module.attr, *(f"inner.{layer}.{attr}" for layer in ("0", name) for attr in ("weight", "bias"))}
    keys = {key.partition(".")[2] for key in vnet.state_dict() if key.startswith("rho.")}
    assert set(vnet.posteriors) == keys == chosen
    vnet(x).sum().backward()
    assert all(q.rho.grad is not None for q in vnet.posteriors.values())
    vnet.set_prior(varify.priors.Gaussian(std=0.5))
    other = varify.variationalize(Named(name))
    for loaded in (copy.deepcopy(vnet), other):
        loaded.load_state_dict(vnet.state_dict())
        loaded.train().eval().double()
        assert list(loaded.state_dict()) == list(vnet.state_dict())
        assert torch.equal(loaded.prior_loss().float(), vnet.double().prior_loss().float())
        vnet.float()


def test_a_leaf_is_replaced_by_one_of_another_kind() -> None:
    tree = Tree()
    for leaf in (nn.Parameter(torch.ones(2)), torch.zeros(2), nn.Linear(2, 2), torch.ones(2)):
        tree.put_leaf("type.weight", leaf)
        assert tree.leaf_at("type.weight") is leaf
    assert list(tree.state_dict()) == ["type.weight"]
    assert tree.leaf_at("type") is tree._modules["type"]
    assert tree.leaf_at("train") is tree.leaf_at("train.weight") is None
