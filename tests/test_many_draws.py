"""How many draws run: with a seed, with gradients, vectorized where that pays, and within the memory for it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import varify
from tests.networks import CASES, seeded
from varify.prediction import many


def small(**options: object) -> varify.VariationalModule:
    torch.manual_seed(0)
    return varify.variationalize(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), **options)


# --- seed


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "nested"])
def test_a_seed_gives_the_draws_of_manual_seed_and_leaves_the_generators_alone(name: str) -> None:
    if name == "nested":
        inner = varify.variationalize(nn.Linear(8, 2))
        vnet, args, kwargs = varify.variationalize(nn.Sequential(nn.Linear(3, 8), inner)), (torch.randn(4, 3),), {}
    else:
        vnet = varify.variationalize(seeded(CASES[name]).eval())
        args, kwargs = CASES[name].calls[0]
    torch.manual_seed(7)
    expected = vnet.predict(*args, n_samples=5, **kwargs).samples
    state = torch.get_rng_state()
    found = vnet.predict(*args, n_samples=5, seed=7, **kwargs).samples
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found, expected)


def test_a_seed_gives_every_batch_the_same_functions() -> None:
    vnet, x = small(), torch.randn(6, 3)
    whole = vnet.predict(x, n_samples=5, seed=1).samples
    parts = [vnet.predict(part, n_samples=5, seed=1).samples for part in x.split(2)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert not torch.equal(vnet.predict(x, n_samples=5, seed=2).samples, whole)
    for seed in (-1, 0.5, True):
        with pytest.raises(varify.ArgumentError, match=r"seed must be an integer of at least 0"):
            vnet.predict(x, seed=seed)


# --- gradients


@pytest.mark.parametrize("vectorize", [True, False, None])
def test_gradients_through_a_prediction_are_those_of_the_written_out_network(vectorize: bool | None) -> None:
    vnet, x = small(), torch.randn(4, 3, requires_grad=True)
    prediction = vnet.predict(x, n_samples=3, seed=0, gradients=True, vectorize=vectorize)
    assert prediction.vectorized == (vectorize is not False)
    parameters = [*vnet.module.parameters(), *vnet.rho.parameters()]
    found = torch.autograd.grad(prediction.std.sum() + prediction.mean.square().sum(), [x, *parameters])
    # the network by hand, at the same noise
    torch.manual_seed(0)
    noise = [{name: torch.randn(p.shape) for name, p in vnet.module.named_parameters()} for _ in range(3)]
    mu, rho = dict(vnet.module.named_parameters()), dict(vnet.rho.named_parameters())
    rho = dict(zip(mu, rho.values(), strict=True))
    outputs = torch.stack(
        [functional_call(vnet.module, {n: mu[n] + F.softplus(rho[n]) * eps[n] for n in mu}, (x,)) for eps in noise]
    )
    loss = outputs.var(0, correction=0).sqrt().sum() + outputs.mean(0).square().sum()
    for one, other in zip(found, torch.autograd.grad(loss, [x, *parameters]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_no_gradients_unless_asked_for_and_not_of_the_linear_expansion() -> None:
    vnet, x = small(), torch.randn(4, 3, requires_grad=True)
    assert not vnet.predict(x).samples.requires_grad
    with torch.no_grad():
        assert vnet.predict(x, gradients=True).samples.requires_grad
    assert torch.is_grad_enabled()
    with pytest.raises(varify.ArgumentError, match="linearized=True has no gradients"):
        vnet.predict(x, linearized=True, gradients=True)


# --- vectorized or not


def test_attention_is_vectorized_on_a_cpu_and_torchs_kernels_come_back() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    vnet, x = varify.variationalize(nn.TransformerEncoder(layer, 2)), torch.randn(3, 5, 16)
    one, other = (vnet.predict(x, n_samples=6, seed=0, vectorize=way) for way in (None, False))
    assert one.vectorized
    assert not other.vectorized
    torch.testing.assert_close(one.samples, other.samples, rtol=1e-4, atol=1e-5)
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


class Counting(nn.Module):
    """Counts its calls, beside the network."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        COUNTS.append(1)
        return self.layer(x)


COUNTS: list[int] = []


def test_what_is_large_runs_sequentially_on_a_cpu_and_what_is_small_at_once() -> None:
    vnet = small()
    assert vnet.predict(torch.randn(4, 3), n_samples=3).vectorized
    assert not vnet.predict(torch.randn(10_000, 3), n_samples=3).vectorized
    assert vnet.predict(torch.randn(4, 3), n_samples=3).vectorized
    wide = varify.variationalize(nn.Sequential(nn.Linear(3, 40_000), nn.Linear(40_000, 2)))
    assert not wide.predict(torch.randn(2, 3), n_samples=3).vectorized
    assert wide.predict(torch.randn(2, 3), n_samples=3, vectorize=True).vectorized
    convolution = varify.variationalize(nn.Conv2d(1, 2, 3))
    assert convolution.predict(torch.randn(1, 1, 8, 8), n_samples=3).vectorized


def test_a_deterministic_body_runs_once_for_all_draws_of_a_head() -> None:
    body = Counting(nn.Sequential(nn.Linear(50, 500), nn.ReLU(), nn.Linear(500, 500), nn.ReLU()))
    vnet = varify.variationalize(nn.Sequential(body, nn.Linear(500, 2)), where="1.*")
    x = torch.randn(300, 50)
    vnet.predict(x, n_samples=2)
    COUNTS.clear()
    prediction = vnet.predict(x, n_samples=100, seed=0)
    assert len(COUNTS) == 1
    assert prediction.vectorized
    torch.testing.assert_close(prediction.samples, vnet.predict(x, n_samples=100, seed=0, vectorize=False).samples)


class Itself(nn.Module):
    """Returns its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight


@pytest.mark.parametrize("network", [Itself(), nn.Linear(3, 2)])
def test_samples_have_memory_of_their_own(network: nn.Module) -> None:
    ensemble, x = varify.variationalize(network).ensemble(4, seed=0), torch.ones(2, 3)
    first = ensemble.predict(x, vectorize=True)
    assert first.vectorized
    assert first.samples.is_contiguous()
    expected = first.samples.clone()
    first.samples.zero_()
    assert torch.equal(ensemble.predict(x, vectorize=True).samples, expected)


def values_of(x: Tensor) -> Tensor:
    """In a vectorized call, those of all draws."""
    functorch = torch._C._functorch
    return functorch.get_unwrapped(x) if functorch.is_batchedtensor(x) else x


def test_vectorized_draws_keep_within_the_memory_for_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    vnet, x = small(), torch.randn(1000, 3)
    largest: list[int] = []
    tanh = nn.Tanh.forward
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: largest.append(values_of(x).numel()) or tanh(self, x))
    monkeypatch.setattr(many, "CHUNK_BYTES", 2**20)
    prediction = vnet.predict(x, n_samples=64, seed=0, vectorize=True)
    assert prediction.vectorized
    sizes = largest[2:]  # the first draw alone, and vectorized by itself
    assert sum(sizes) == 64 * 1000 * 8
    assert 2**18 < 2 * 4 * max(sizes) <= 2**20  # bytes of what goes into tanh and comes out


def test_a_loader_is_no_input() -> None:
    loader = torch.utils.data.DataLoader(torch.randn(4, 3))
    with pytest.raises(varify.ArgumentError, match=r"got a DataLoader: vnet.ensemble\(n_samples\).predict_loader"):
        small().predict(loader)
