"""Predictions of the linear expansion at the means, against explicit Jacobians."""

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils import _pytree as pytree

import varify
from tests.networks import CASES, DictOutput, seeded
from varify import Prediction
from varify.experiments.data import digits
from varify.experiments.models import LeNet
from varify.prediction.linearizing import PLAIN_KERNELS


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    )


def small(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "convolutions":
        return convolutions().double().eval(), torch.randn(2, 1, 6, 6, dtype=torch.float64)
    case = CASES[name]
    (x,), _ = case.calls[0]
    return case.make().double().eval(), x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", ["mlp", "tied", "convolutions", "lstm", "gru", "looped cell", "transformer"])
def test_it_is_the_explicit_jacobian_times_the_way_of_each_weight(name: str, vectorize: bool) -> None:
    network, x = small(name)
    vnet = varify.variationalize(network, init=varify.inits.Constant(0.3)).double()
    torch.manual_seed(3)
    found = vnet.predict(x, n_samples=4, vectorize=vectorize, linearized=True).samples
    torch.manual_seed(3)
    draws = [{n: q.rsample().detach() for n, q in vnet.posteriors.items()} for _ in range(4)]
    with torch.enable_grad():
        output = network(x)
    rows = []
    for value in output.flatten():
        parameters = [network.get_parameter(n) for n in vnet.posteriors]
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    jacobian = torch.stack(rows)
    mu = torch.cat([network.get_parameter(n).detach().flatten() for n in vnet.posteriors])
    expected = [
        output + (jacobian @ (torch.cat([d.flatten() for d in w.values()]) - mu)).view_as(output) for w in draws
    ]
    torch.testing.assert_close(found, torch.stack(expected).detach())
    assert not found.requires_grad


@pytest.mark.parametrize("vectorize", [None, True, False])
def test_of_a_linear_network_it_is_the_ordinary_prediction(vectorize: bool | None) -> None:
    torch.manual_seed(0)
    vnet = varify.variationalize(nn.Linear(3, 2), init=varify.inits.Constant(2.0)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    both = []
    for linearized in (True, False):
        torch.manual_seed(1)
        both.append(vnet.predict(x, n_samples=40, vectorize=vectorize, linearized=linearized).samples)
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
    with vnet.fixed_draw():
        torch.testing.assert_close(vnet.predict(x, linearized=True).samples, vnet.predict(x).samples)


# The derivative that torch has for it is not that of its values; its output has noise of its own.
OTHERWISE = {"custom function", "noisy"}


@pytest.mark.parametrize("name", sorted(CASES.keys() - OTHERWISE))
def test_every_network_is_linear_nearby(name: str) -> None:
    both = []
    args, kwargs = CASES[name].calls[0]
    for linearized in (True, False):
        vnet = varify.variationalize(seeded(CASES[name]).eval(), init=varify.inits.Constant(1e-4))
        torch.manual_seed(1)
        predicted = vnet.predict(*args, n_samples=3, linearized=linearized, **kwargs)
        both.append([leaf for leaf in pytree.tree_leaves(predicted) if isinstance(leaf, Prediction)])
    assert both[0]
    for near, exact in zip(*both, strict=True):
        if not exact.samples.is_floating_point():
            assert torch.equal(near.samples, exact.samples)
            continue
        scale = exact.std.max().item()
        # rounding of outputs of order 1 is 1e-3 of what weights that move by 1e-4 do
        torch.testing.assert_close(near.samples, exact.samples, rtol=0.0, atol=0.03 * scale)


def test_seldom_kernels_are_torchs_own_again_afterwards() -> None:
    def switches() -> list[bool]:
        return [switch.is_on() for switch in PLAIN_KERNELS.switches]

    before = switches()
    vnet = varify.variationalize(seeded(CASES["lstm"]).eval())
    vnet.predict(*CASES["lstm"].calls[0][0], linearized=True)
    assert switches() == before
    with pytest.raises(RuntimeError):
        vnet.predict(torch.ones(2, 3, 7), linearized=True)
    assert switches() == before
    with PLAIN_KERNELS:
        inner = threading.Thread(target=lambda: PLAIN_KERNELS.__enter__())
        inner.start()
        inner.join()
    assert not any(switches())  # another thread is within still
    PLAIN_KERNELS.__exit__()
    assert switches() == before


class Cube(torch.autograd.Function):
    """Without a derivative in forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class CubeOnce(Cube):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Cubed(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.fc, self.function = nn.Linear(3, 2), function
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        y = self.fc(x)
        self.seen += y.sum(0)
        return self.function(y), y.argmax(1), 7


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cubed, self.head = Cubed(CubeOnce.apply), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cubed(x)[0])


def test_a_function_without_forward_mode_goes_by_reverse_mode_twice() -> None:
    torch.manual_seed(0)
    network, x = Cubed(Cube.apply), torch.randn(4, 3)
    vnet = varify.variationalize(network, init=varify.inits.Constant(0.5))
    torch.manual_seed(1)
    found, labels, seven = vnet.predict(x, n_samples=6, linearized=True)
    torch.manual_seed(1)
    linear = varify.variationalize(network.fc, init=varify.inits.Constant(0.5)).predict(x, n_samples=6)
    y = network.fc(x).detach()
    torch.testing.assert_close(found.samples, y**3 + 3 * y**2 * (linear.samples - y))
    assert torch.equal(labels.samples, y.argmax(1).expand(6, -1))
    assert seven == 7
    assert not vnet.module.seen.any()


def test_bad_input_and_what_has_no_derivative() -> None:
    x = torch.randn(4, 3)
    vnet = varify.variationalize(Cubed(CubeOnce.apply)).train()
    modes, state = [m.training for m in vnet.modules()], vnet.state_dict()
    before = {k: v.clone() for k, v in state.items() if isinstance(v, Tensor)}
    with pytest.raises(
        varify.ArgumentError,
        match=r"linearized=True needs the derivative by the weights, but torch says: .*autograd.Function",
    ):
        vnet.predict(x, linearized=True)
    with pytest.raises(
        varify.ArgumentError, match="linearized=True needs the derivative"
    ):  # the last layer alone has one
        varify.variationalize(Headed()).predict(x, linearized=True)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        vnet.predict(x[:, :2], linearized=True)
    assert [m.training for m in vnet.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in vnet.state_dict().items() if k in before)

    class Labels(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    with pytest.raises(varify.ArgumentError, match="returns floating-point tensors"):
        varify.variationalize(Labels(3, 2)).predict(x, linearized=True)
    nested = varify.variationalize(nn.Sequential(nn.Linear(3, 3), varify.variationalize(nn.Linear(3, 2))), where="0.*")
    with pytest.raises(varify.ArgumentError, match="got one at '1': variationalize the plain network as a whole"):
        nested.predict(x, linearized=True)


@dataclasses.dataclass
class Output:
    logits: Tensor
    label: Tensor
    name: str = "a"


def test_structures_and_masks() -> None:
    vnet = varify.variationalize(DictOutput())
    predicted = vnet.predict({"x": torch.ones(4, 3)}, n_samples=5, linearized=True)
    assert predicted["logits"].samples.shape == (5, 4, 2)
    assert predicted["extra"][1:] == (None, "a name")

    class Named(nn.Linear):
        def forward(self, x: Tensor) -> Output:
            y = super().forward(x)
            return Output(y, y.argmax(1))

    vnet = varify.variationalize(Named(3, 2))
    varify.prune(vnet, 1.0, where="weight")
    found = vnet.predict(torch.randn(4, 3), n_samples=5, linearized=True)
    assert isinstance(found, Output)
    assert torch.equal(found.logits.samples, found.logits.samples[:, :1].expand(5, 4, 2))  # of the bias alone
    assert found.logits.std.min() > 0
    assert found.name == "a"

    class Packed(nn.Linear):
        def forward(self, packed: PackedSequence) -> PackedSequence:
            return packed._replace(data=super().forward(packed.data))

    vnet = varify.variationalize(Packed(3, 2))
    sequences = pack_padded_sequence(torch.randn(2, 4, 3), [4, 2], batch_first=True)
    assert vnet.predict(sequences, n_samples=5, linearized=True).data.samples.shape == (5, 6, 2)


def test_what_is_detached_has_no_part() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x).detach()

    torch.manual_seed(0)
    vnet, x = varify.variationalize(Half()), torch.randn(4, 3)
    torch.manual_seed(1)
    found = vnet.predict(x, n_samples=3, linearized=True).samples
    torch.manual_seed(1)
    draws = [{n: q.rsample() for n, q in vnet.posteriors.items()} for _ in range(3)]
    b = vnet.module.b(x)
    torch.testing.assert_close(
        found, torch.stack([F.linear(x, w["a.weight"], w["a.bias"]) + b for w in draws]).detach()
    )


def test_under_autocast_and_of_a_network_in_half_precision() -> None:
    torch.manual_seed(0)
    network, x = seeded(CASES["mlp"]).eval(), torch.randn(4, 3)
    exact = varify.variationalize(network, init=varify.inits.Constant(0.1))
    torch.manual_seed(1)
    expected = exact.predict(x, n_samples=5, linearized=True).samples
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(1)
        found = exact.predict(x, n_samples=5, linearized=True).samples
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    exact.to(torch.bfloat16)
    assert exact.predict(x.bfloat16(), n_samples=5, linearized=True).samples.dtype == torch.bfloat16


def test_a_laplace_posterior_at_temperature_1_keeps_the_accuracy_of_a_lenet() -> None:
    images = digits(Path())
    torch.manual_seed(0)
    network = LeNet()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    x, y = images.train[:300], images.train_labels[:300]
    for _ in range(25):
        for batch in torch.randperm(300).split(50):
            optimizer.zero_grad()
            F.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
    vnet = varify.variationalize(network.eval(), prior="gaussian")
    varify.fit_sigma(vnet, [(x, y)], F.cross_entropy, num_data=300, temperature=1)
    held_out, labels = images.test, images.test_labels
    share = lambda p: (p.argmax(1) == labels).double().mean().item()  # noqa: E731
    plain = share(vnet.eval()(held_out))
    torch.manual_seed(1)
    linearized = share(vnet.predict(held_out, n_samples=32, linearized=True).probabilities())
    drawn = share(vnet.predict(held_out, n_samples=32).probabilities())
    assert plain > 0.85
    assert linearized > plain - 0.03
    assert drawn < linearized
