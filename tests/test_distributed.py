"""Two processes on one machine: DistributedDataParallel and FSDP2, compared with one process on the whole batch."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import varify

RANKS = 2
NUM_DATA = 50
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


class Network(nn.Module):
    """A part that torch.fx sees, and one that it doesn't."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.rnn, self.out = nn.Linear(3, 4), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(torch.tanh(self.fc(x)))[0][:, -1])


def make(seed: int = 0) -> varify.VariationalModule:
    torch.manual_seed(seed)
    return varify.variationalize(
        Network(), init=varify.inits.Constant(0.1), prior=varify.priors.Gaussian(centered=True)
    )


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 5, 3, generator=generator), torch.randn(8, 2, generator=generator)


def rows(rank: int) -> slice:
    return slice(4 * rank, 4 * rank + 4)


def noise(rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(10 + rank)
    return {name: torch.randn(q.mu.shape, generator=generator) for name, q in make().posteriors.items()}


def loss_of(network: nn.Module, vnet: varify.VariationalModule, rank: int) -> Tensor:
    x, y = batch()
    with vnet.fixed_draw(noise(rank)):
        return F.mse_loss(network(x[rows(rank)]), y[rows(rank)]) + vnet.prior_loss() / NUM_DATA


def in_two_processes(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `work(rank)` returns in each of two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_work, (work, str(folder), port), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def _work(rank: int, work: Callable[[int], Any], folder: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    torch.save(work(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


# --- one process, by hand: each half of the batch with the noise of its rank; the divergence once


def one_step() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    vnet = make()
    (sum(loss_of(vnet, vnet, rank) for rank in range(RANKS)) / RANKS).backward()  # type: ignore[union-attr]
    grads = {name: p.grad.clone() for name, p in vnet.named_parameters() if p.grad is not None}
    torch.optim.SGD(vnet.parameters(), lr=0.1).step()
    return grads, {name: p.detach() for name, p in vnet.named_parameters()}


def three_steps() -> dict[str, Tensor]:
    vnet = make()
    optimizer = torch.optim.Adam(vnet.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (sum(loss_of(vnet, vnet, rank) for rank in range(RANKS)) / RANKS).backward()  # type: ignore[union-attr]
        optimizer.step()
    return {name: value for name, value in vnet.state_dict().items() if isinstance(value, Tensor)}


# --- DistributedDataParallel


def with_ddp(rank: int) -> dict[str, Any]:
    vnet = make(seed=rank)  # the wrapper makes all alike
    network = nn.parallel.DistributedDataParallel(vnet, find_unused_parameters=False)
    loss_of(network, vnet, rank).backward()
    grads = {name: p.grad.clone() for name, p in vnet.named_parameters() if p.grad is not None}
    torch.optim.SGD(vnet.parameters(), lr=0.1).step()
    after = {name: p.detach().clone() for name, p in vnet.named_parameters()}
    torch.manual_seed(rank)
    x, _ = batch()
    drawn = network(x).detach()
    optimizer = torch.optim.Adam(vnet.parameters(), lr=0.05)
    for _ in range(3):  # fresh draws, on each rank its own
        optimizer.zero_grad()
        (F.mse_loss(network(x[rows(rank)]), batch()[1][rows(rank)]) + vnet.prior_loss() / NUM_DATA).backward()
        optimizer.step()
    trained = {name: p.detach() for name, p in vnet.named_parameters()}
    return {"grads": grads, "after": after, "drawn": drawn, "trained": trained}


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return in_two_processes(with_ddp, tmp_path_factory.mktemp("ddp"))


def test_ddp_has_the_gradients_of_one_process_and_counts_the_divergence_once(ddp: list[Any]) -> None:
    grads, after = one_step()
    assert grads.keys() == dict(make().named_parameters()).keys()
    for found in ddp:
        torch.testing.assert_close(found["grads"], grads, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["after"], after, rtol=1e-4, atol=1e-6)


def test_ddp_keeps_the_parameters_of_all_ranks_alike_though_their_draws_differ(ddp: list[Any]) -> None:
    for name, value in ddp[0]["trained"].items():
        assert torch.equal(value, ddp[1]["trained"][name])
        assert not torch.equal(value, ddp[0]["after"][name])
    assert not torch.allclose(ddp[0]["drawn"], ddp[1]["drawn"], atol=1e-3)


# --- FSDP2


def with_fsdp(rank: int) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    vnet = make()
    fully_shard(vnet, mesh=dist.init_device_mesh("cpu", (RANKS,)))
    sharded = {name: type(p).__name__ for name, p in vnet.named_parameters()}
    optimizer = torch.optim.Adam(vnet.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(vnet, vnet, rank).backward()
        optimizer.step()
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(vnet, options=whole)
    plain = make(seed=5)
    if rank == 0:
        plain.load_state_dict(gathered)
    optimizer.zero_grad()
    kl = vnet.prior_loss()  # before a forward, when each rank has its part of the parameters
    kl.backward()
    kl_grad = vnet.rho.leaf_at("fc.weight").grad.full_tensor()
    prediction = vnet.predict(batch()[0], n_samples=3)
    again = {name: value for name, value in gathered.items() if isinstance(value, Tensor)}
    loaded = make(seed=6)
    fully_shard(loaded, mesh=dist.init_device_mesh("cpu", (RANKS,)))
    set_model_state_dict(loaded, gathered, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    back = get_model_state_dict(loaded, options=whole)
    drawn = vnet(batch()[0]).detach()
    return {
        "sharded": sharded,
        "gathered": again,
        "back": {name: value for name, value in back.items() if isinstance(value, Tensor)},
        "kl": kl.detach(),
        "kl grad": kl_grad,
        "plain kl": plain.prior_loss().detach(),
        "plain kl grad": torch.autograd.grad(plain.prior_loss(), plain.rho.leaf_at("fc.weight"))[0],
        "predicted": prediction.samples,
        "drawn": drawn,
    }


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return in_two_processes(with_fsdp, tmp_path_factory.mktemp("fsdp"))


def test_fsdp_matches_one_process_and_gathers_its_state(fsdp: list[Any]) -> None:
    expected = three_steps()
    for found in fsdp:
        assert set(found["sharded"].values()) == {"DTensor"}
        if found["gathered"]:  # on rank 0 alone, as torch has it
            torch.testing.assert_close(found["gathered"], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found["back"], expected, rtol=1e-4, atol=1e-5)
    assert fsdp[0]["gathered"]
    for found in fsdp:
        for what in ("kl", "kl grad"):
            torch.testing.assert_close(found[what], fsdp[0][f"plain {what}"], rtol=1e-4, atol=1e-4)
        assert found["drawn"].shape == (8, 2)
        assert found["predicted"].std(0).all()


# --- estimators


class Recorded(nn.Module):
    """With a block that torch recomputes, and batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(5)
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.first(x)))
        h = checkpoint(lambda t: torch.dropout(torch.tanh(self.inner(t)), 0.2, True), h, use_reentrant=False)
        return self.out(h.mean(1))


def with_estimators(rank: int) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    found: dict[str, Any] = {}
    for way in ("ddp", "fsdp"):
        torch.manual_seed(rank)
        vnet = varify.variationalize(Recorded(), estimator="auto", strict=True)
        if way == "ddp":
            network: nn.Module = nn.parallel.DistributedDataParallel(vnet)
        else:
            network = vnet
            fully_shard(vnet, mesh=dist.init_device_mesh("cpu", (RANKS,)))
        optimizer = torch.optim.Adam(vnet.parameters(), lr=0.01)
        for step in range(4):
            torch.manual_seed(10 * step + rank)
            x, y = batch()
            optimizer.zero_grad()
            (F.mse_loss(network(x[rows(rank)]), y[rows(rank)]) + vnet.prior_loss() / NUM_DATA).backward()
            optimizer.step()
        plans = vnet.engine.plans.values()
        found[f"{way} plans"] = len(plans)
        found[f"{way} estimators"] = {n: d.estimator for plan in plans for n, d in plan.decisions.items()}
        whole = {n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in vnet.named_parameters()}
        found[way] = {n: p.detach().clone() for n, p in whole.items()}
    return found


def test_estimators_are_planned_once_a_rank_and_alike(tmp_path: Path) -> None:
    ranks = in_two_processes(with_estimators, tmp_path)
    for way in ("ddp", "fsdp"):
        assert ranks[0][f"{way} plans"] == ranks[1][f"{way} plans"] == 1
        assert ranks[0][f"{way} estimators"] == ranks[1][f"{way} estimators"]
        assert ranks[0][f"{way} estimators"]["first.weight"] == "flipout"
        assert ranks[0][f"{way} estimators"]["out.weight"] == "local"
        for name, value in ranks[0][way].items():
            assert value.isfinite().all()
            assert torch.equal(value, ranks[1][way][name]), name
