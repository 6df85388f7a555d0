"""On a GPU: devices, draws, half precision, CUDA graphs, the same bits from the same seed. Skipped without one."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import varify
from tests.networks import CASES, seeded

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # cuDNN's, about weights that were drawn and so lie in no single chunk
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
]
NAMES = ("mlp", "cnn", "tied", "lstm", "gru", "transformer", "raw parameters", "untraceable", "weight norms")


def on_gpu(tree: Any) -> Any:
    return pytree.tree_map(lambda t: t.cuda() if isinstance(t, Tensor) else t, tree)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("estimator", ["weights", "auto"])
def test_all_that_is_there_is_on_the_device(name: str, estimator: str) -> None:
    plain = seeded(CASES[name])
    args, kwargs = on_gpu(CASES[name].calls[0])
    converted = varify.variationalize(plain, estimator=estimator)
    converted(*CASES[name].calls[0][0])  # a program was made on the CPU
    for vnet in (converted.cuda(), varify.variationalize(plain.cuda(), estimator=estimator), copy.deepcopy(converted)):
        output = vnet(*args, **kwargs)
        (output.float().square().mean() + vnet.prior_loss() / 1000).backward()
        for parameter in vnet.parameters():
            assert parameter.is_cuda
            assert parameter.grad is None or parameter.grad.is_cuda
        assert vnet.posteriors[next(iter(vnet.posteriors))].noise().is_cuda
        prediction = vnet.predict(*args, n_samples=4, **kwargs)
        assert prediction.samples.is_cuda
        assert prediction.std.any()


@pytest.mark.parametrize("name", NAMES)
def test_without_noise_it_is_the_original_on_the_device(name: str) -> None:
    plain = seeded(CASES[name]).cuda().eval()
    vnet = varify.variationalize(plain)
    for parameter in vnet.posteriors:
        vnet.get_parameter(f"rho.{parameter}").data.fill_(-200.0)
    args, kwargs = on_gpu(CASES[name].calls[0])
    with vnet.sampling():
        torch.testing.assert_close(vnet(*args, **kwargs), plain(*args, **kwargs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied", "raw parameters"])
def test_the_same_seed_gives_the_same_bits_on_one_device(name: str) -> None:
    vnet = varify.variationalize(seeded(CASES[name])).cuda()
    args, kwargs = on_gpu(CASES[name].calls[0])
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(vnet(*args, **kwargs))
    assert torch.equal(*outputs)
    before = torch.get_rng_state()
    vnet(*args, **kwargs)
    assert torch.equal(torch.get_rng_state(), before)  # the draws are the device's own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["cnn", "lstm", "transformer"])
def test_autocast_with_a_gradient_scaler(name: str, dtype: torch.dtype) -> None:
    vnet = varify.variationalize(seeded(CASES[name]), init=varify.inits.Constant(0.01)).cuda()
    args, kwargs = on_gpu(CASES[name].calls[0])
    optimizer = torch.optim.Adam(vnet.parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            loss = vnet(*args, **kwargs).float().square().mean() + vnet.prior_loss() / 1000
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert all(p.grad.isfinite().all() for p in vnet.parameters() if p.grad is not None)
        scaler.step(optimizer)
        scaler.update()


def test_a_step_in_a_cuda_graph() -> None:
    torch.manual_seed(0)
    vnet = varify.variationalize(
        nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), init=varify.inits.Constant(0.01)
    ).cuda()
    optimizer = torch.optim.Adam(vnet.parameters(), lr=0.05, capturable=True)
    x = torch.randn(64, 3, device="cuda")
    y = (x[:, 0] > 0).long()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(vnet(x), y) + vnet.prior_loss() / 1e5
        loss.backward()
        optimizer.step()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            first = step().item()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    losses = []
    for _ in range(100):
        graph.replay()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * first
    assert len(set(losses)) == 100  # each replay draws afresh


def test_a_compiled_network_on_the_device() -> None:
    vnet = varify.variationalize(seeded(CASES["mlp"])).cuda()
    for name in vnet.posteriors:
        vnet.get_parameter(f"rho.{name}").data.fill_(-30.0)
    x = torch.randn(4, 3, device="cuda")
    torch.testing.assert_close(torch.compile(vnet, fullgraph=True)(x), vnet.module(x), rtol=1e-4, atol=1e-4)
