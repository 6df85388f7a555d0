"""torch's ways of running, differentiating and averaging a module."""

import copy
import random
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import varify
from tests.networks import CASES, seeded
from tests.zoo.own_networks import Checkpointed


def mlp(**options: Any) -> varify.VariationalModule:
    torch.manual_seed(0)
    return varify.variationalize(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)), **options)


def without_noise(vnet: varify.VariationalModule) -> varify.VariationalModule:
    for name in vnet.posteriors:
        vnet.get_parameter(f"rho.{name}").data.fill_(-30.0)  # a sigma of 1e-13, with a finite divergence
    return vnet


def data(n: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 3, generator=generator), torch.randint(2, (n,), generator=generator)


def loss_of(vnet: varify.VariationalModule, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(vnet(x), y) + vnet.prior_loss() / 100


def gradients(vnet: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    vnet.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in vnet.named_parameters() if p.grad is not None}


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=rtol, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# --- mixed precision


@pytest.mark.parametrize("name", ["cnn", "gru", "transformer"])
@pytest.mark.parametrize("estimator", ["weights", "auto"])
def test_autocast(name: str, estimator: str) -> None:  # not every CPU has an LSTM in half precision
    vnet = varify.variationalize(seeded(CASES[name]), estimator=estimator)
    ((x,), _) = CASES[name].calls[0]
    for dtype in (torch.bfloat16, torch.float16) if name != "gru" else (torch.bfloat16,):
        with torch.autocast("cpu", dtype):
            output = vnet(x)
            loss = output.float().square().mean() + vnet.prior_loss() / 1000
        found = gradients(vnet, loss)
        assert found.keys() == dict(vnet.named_parameters()).keys()
        assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in found.values())
    expected = vnet.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (vnet(x).float() - expected).abs().max() < 0.05 * (1 + expected.abs().max())


def test_a_gradient_scaler_scales_the_divergence_as_well() -> None:
    x, y = data()
    steps = []
    for enabled in (False, True):
        vnet = without_noise(mlp())
        optimizer = torch.optim.SGD(vnet.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        scaler.scale(loss_of(vnet, x, y)).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(vnet.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        steps.append((norm, [p.detach().clone() for p in vnet.parameters()]))
    torch.testing.assert_close(steps[0], steps[1])


# --- torch.func


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's jvp
def test_functional_form_under_grad_vmap_and_jvp() -> None:
    vnet = mlp()
    x, y = data()
    f = vnet.functional(x)
    theta = {name: q.rsample().detach() for name, q in vnet.posteriors.items()}
    plain = vnet.mean_model()

    def reference(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(plain, theta, (x,)), y)

    def loss(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f(theta, x), y)

    found, expected = (torch.func.grad(g)(theta, x, y) for g in (loss, reference))
    torch.testing.assert_close(found, expected)
    each = torch.func.vmap(torch.func.grad(lambda t, a, b: loss(t, a[None], b[None])), (None, 0, 0))(theta, x, y)
    for i in range(len(x)):  # per-sample gradients, sequentially
        one = torch.func.grad(reference)(theta, x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close({n: g[i] for n, g in each.items()}, one)
    tangents = {name: torch.randn_like(w) for name, w in theta.items()}
    _, slope = torch.func.jvp(lambda t: loss(t, x, y), (theta,), (tangents,))
    torch.testing.assert_close(slope, sum((expected[n] * tangents[n]).sum() for n in theta))


def test_many_weights_vectorized() -> None:
    vnet = mlp()
    x, _ = data()
    f = vnet.functional(x)
    thetas = [{name: q.rsample().detach() for name, q in vnet.posteriors.items()} for _ in range(3)]
    stacked = {name: torch.stack([t[name] for t in thetas]) for name in thetas[0]}
    vectorized = torch.func.vmap(lambda t: f(t, x))(stacked)
    torch.testing.assert_close(vectorized, torch.stack([f(t, x) for t in thetas]))


def test_gradients_of_the_divergence_by_torch_func() -> None:
    vnet = mlp()
    state = {n: p.detach() for n, p in vnet.named_parameters()}
    found = torch.func.grad(
        lambda s: torch.func.functional_call(_Divergence(vnet), {f"vnet.{n}": t for n, t in s.items()}, ())
    )(state)
    torch.testing.assert_close(found, gradients(vnet, vnet.prior_loss()))


class _Divergence(nn.Module):
    def __init__(self, vnet: varify.VariationalModule) -> None:
        super().__init__()
        self.vnet = vnet

    def forward(self) -> Tensor:
        return self.vnet.prior_loss()


# --- training loops


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    x, y = data()
    vnet = without_noise(mlp())
    whole = gradients(vnet, loss_of(vnet, x, y))
    vnet.zero_grad()
    for part in range(4):
        rows = slice(4 * part, 4 * part + 4)
        (loss_of(vnet, x[rows], y[rows]) / 4).backward()
    assert_gradients({n: p.grad for n, p in vnet.named_parameters()}, whole)  # type: ignore[misc]


def test_clipping_bounds_mu_and_rho_together() -> None:
    vnet = mlp()
    loss_of(vnet, *data()).backward()
    before = torch.cat([p.grad.flatten() for p in vnet.parameters()]).norm()  # type: ignore[union-attr]
    norm = torch.nn.utils.clip_grad_norm_(vnet.parameters(), 0.01)
    after = torch.cat([p.grad.flatten() for p in vnet.parameters()]).norm()  # type: ignore[union-attr]
    torch.testing.assert_close(norm, before)
    assert after.item() == pytest.approx(0.01, rel=1e-3)


def test_lbfgs_within_a_fixed_draw() -> None:
    vnet = mlp(init=varify.inits.Constant(0.1))
    x, y = data()
    optimizer = torch.optim.LBFGS(vnet.parameters(), line_search_fn="strong_wolfe", max_iter=20)
    values = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(vnet, x, y)
        loss.backward()
        values.append(loss.item())
        return loss

    with vnet.fixed_draw():
        assert closure() == closure()
        optimizer.step(closure)  # type: ignore[arg-type]
        assert closure() < 0.5 * values[0]
    assert closure() != closure()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_with_the_drawn_weights_and_saves_memory(reentrant: bool) -> None:
    torch.manual_seed(0)
    vnet = varify.variationalize(Checkpointed(reentrant), init=varify.inits.Constant(0.5)).eval()
    x = torch.randn(4, 3, requires_grad=True)
    saved: dict[bool, int] = {}
    found = {}
    with vnet.sampling(), vnet.fixed_draw():
        drawn = vnet.sample_model()
        for checkpointing in (True, False):
            vnet.module.part = partial(type(vnet.module).part, vnet.module)
            if not checkpointing:
                vnet.module.forward = partial(_unchecked, vnet.module)
            output, saved[checkpointing] = _with_count(vnet, x)
            found[checkpointing] = gradients(vnet, output.square().sum())
    assert saved[True] < saved[False]
    assert_gradients(found[True], found[False])
    grads = gradients(drawn, drawn(x).square().sum())
    assert_gradients({n: found[True][f"module.{n}"] for n in grads}, grads)


def _with_count(network: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """The output, and how many tensors were kept for backward."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return network(x), len(kept)


def _unchecked(network: Any, x: Tensor) -> Tensor:
    for i in range(3):
        x = network.part(x, i)
    return network.head(x)


class SharedInCheckpoints(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor, checkpoints: bool = True) -> Tensor:
        if not checkpoints:
            return self.fc(self.fc(x))
        return checkpoint(self.fc, checkpoint(self.fc, x, use_reentrant=True), use_reentrant=True)


def test_a_large_weight_in_two_reentrant_checkpoints_is_refused_by_torch_and_not_silently_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("varify.weights.draw.LARGE", 1)
    vnet = varify.variationalize(SharedInCheckpoints())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        vnet(torch.randn(2, 3, requires_grad=True)).sum().backward()


def test_small_weights_in_two_reentrant_checkpoints_have_the_gradients_of_both() -> None:
    vnet, x = varify.variationalize(SharedInCheckpoints()), torch.randn(2, 3, requires_grad=True)
    with vnet.fixed_draw():
        vnet(x).square().sum().backward()
        found = {name: p.grad for name, p in vnet.named_parameters()}
        assert_gradients(found, gradients(vnet, vnet(x, checkpoints=False).square().sum()))


def test_averaged_models() -> None:
    x, y = data()
    vnet = mlp()
    swa = torch.optim.swa_utils.AveragedModel(vnet)
    ema = torch.optim.swa_utils.AveragedModel(vnet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(vnet.parameters(), lr=0.1)
    steps = []
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(vnet, x, y).backward()
        optimizer.step()
        swa.update_parameters(vnet)
        ema.update_parameters(vnet)
        steps.append({n: p.detach().clone() for n, p in vnet.named_parameters()})
    for name in steps[0]:
        torch.testing.assert_close(swa.module.get_parameter(name), sum(s[name] for s in steps) / 3)
        expected = 0.25 * steps[0][name] + 0.25 * steps[1][name] + 0.5 * steps[2][name]
        torch.testing.assert_close(ema.module.get_parameter(name), expected)
    swa.eval()
    torch.testing.assert_close(swa(x), swa.module.module(x))
    assert swa.module.predict(x, n_samples=4).samples.shape == (4, 16, 2)
    assert swa.module.prior_loss() > 0
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    averaged = torch.optim.swa_utils.AveragedModel(varify.variationalize(net))
    torch.optim.swa_utils.update_bn([x], averaged)
    assert averaged.module.module[1].num_batches_tracked == 1


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


def test_a_parametrized_weight_is_drawn_beneath_its_parametrization() -> None:
    net = nn.Linear(3, 3)
    parametrize.register_parametrization(net, "weight", Symmetric())
    vnet = varify.variationalize(net)
    assert set(vnet.posteriors) == {"bias", "parametrizations.weight.original"}
    drawn = vnet.sample_model().weight
    assert torch.equal(drawn, drawn.mT)
    x = torch.eye(3)
    with vnet.fixed_draw({"bias": torch.zeros(3)}):
        output = vnet(x) - vnet.module.bias
    torch.testing.assert_close(output, output.mT)
    assert not torch.allclose(output, vnet.module.weight)


def test_parametrizing_after_the_conversion_is_refused_with_the_reason() -> None:
    vnet = varify.variationalize(nn.Linear(3, 3))
    parametrize.register_parametrization(vnet.module, "weight", Symmetric())
    with pytest.raises(varify.StructureError, match=r"weight of vnet\.module changed since the conversion"):
        vnet(torch.eye(3))


# --- threads


@pytest.mark.parametrize("name", ["cnn", "lstm", "untraceable", "transformer"])
def test_threads_that_predict_and_run_concurrently_get_the_right_answers(name: str) -> None:
    vnet = varify.variationalize(seeded(CASES[name]), init=varify.inits.Constant(1e-3))
    args, kwargs = CASES[name].calls[0]
    with torch.no_grad():
        mean = vnet.mean_model().eval()(*args, **kwargs)
    for module in vnet.modules():  # predictions of a network in training mode
        assert module.training
    wrong: list[str] = []

    def predicting() -> None:
        for _ in range(5):
            draws = vnet.predict(*args, n_samples=4, **kwargs).samples
            if (draws - mean).abs().max() > 0.1 or draws.std(0).max() == 0:
                wrong.append("a prediction")

    def at_the_mean(evaluated: varify.VariationalModule) -> None:
        for _ in range(40):
            if not torch.allclose(evaluated(*args, **kwargs), mean, atol=1e-6):
                wrong.append("a forward at the mean")

    _concurrently([predicting] * 3, wrong)
    assert not wrong
    assert all(module.training for module in vnet.modules())
    vnet.eval()
    _concurrently([predicting, predicting, partial(at_the_mean, vnet), partial(at_the_mean, vnet)], wrong)
    assert not wrong
    assert not vnet.training


def _concurrently(jobs: list[Callable[[], None]], wrong: list[str]) -> None:
    def run(job: Callable[[], None]) -> None:
        try:
            with torch.no_grad():
                job()
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_threads_never_share_a_draw_nor_see_each_others_weights() -> None:
    vnet = varify.variationalize(seeded(CASES["untraceable"]), init=varify.inits.Constant(1.0))
    x = torch.ones(2, 3)
    state = {name: value.clone() for name, value in vnet.state_dict().items() if isinstance(value, Tensor)}
    rows: list[tuple[float, ...]] = []
    wrong: list[str] = []

    def predicting() -> None:
        for _ in range(40):
            rows.extend(tuple(draw.flatten().tolist()) for draw in vnet.predict(x, n_samples=8).samples)

    def looking() -> None:
        for _ in range(100):
            found = vnet.state_dict()
            if not all(torch.equal(found[name], value) for name, value in state.items()):
                wrong.append("a state dict")
            if not all(isinstance(p, nn.Parameter) for p in copy.deepcopy(vnet).module.parameters()):
                wrong.append("a copy")
            vnet.zero_grad()

    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-5)
        _concurrently([predicting, predicting, looking], wrong)
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert len(set(rows)) == len(rows) == 640


def test_another_threads_random_numbers_are_its_own_and_hide_nothing() -> None:
    drawn: list[float] = []
    done = threading.Event()

    def drawing() -> None:
        while not done.is_set():
            drawn.append(random.random())
            time.sleep(0.002)

    thread = threading.Thread(target=drawing)
    thread.start()
    try:
        for _ in range(10):
            vnet = mlp(estimator="local", strict=True)
            vnet(torch.randn(4, 3))
    finally:
        done.set()
        thread.join()
    assert len(set(drawn)) == len(drawn)


def test_backward_of_a_checkpoint_on_another_thread_within_an_opaque_forward() -> None:
    class Forces(nn.Module):
        """What an autograd engine with threads of its own does, as CUDA's does."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            energy = checkpoint(lambda t: torch.tanh(self.fc(t)), x, use_reentrant=False).sum()
            found: list[Tensor] = []
            thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(energy, x)))
            thread.start()
            thread.join(20)
            return found[0]

    vnet = varify.variationalize(Forces(), init=varify.inits.Constant(1.0))
    x = torch.randn(2, 3, requires_grad=True)
    with vnet.fixed_draw():
        torch.testing.assert_close(vnet(x), vnet.sample_model()(x))


def test_modes_and_contexts_survive_threads() -> None:
    vnet = varify.variationalize(seeded(CASES["untraceable"]))
    entered, leave = threading.Event(), threading.Event()

    def first() -> None:
        with vnet.sampling():
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(20)
    with vnet.sampling():
        leave.set()
        thread.join()
    x = torch.ones(2, 3)
    assert torch.equal(vnet.eval()(x), vnet(x))


def test_threads_with_separate_networks() -> None:
    vnets = [varify.variationalize(seeded(CASES["untraceable"])) for _ in range(4)]
    x = torch.ones(4, 3)
    expected = copy.deepcopy(vnets[0]).predict(x, n_samples=2).samples.shape
    wrong: list[str] = []
    shapes: list[torch.Size] = []
    _concurrently([lambda v=v: shapes.append(v.predict(x, n_samples=2).samples.shape) for v in vnets], wrong)
    assert not wrong
    assert shapes == [expected] * 4


def test_the_same_seed_gives_the_same_bits() -> None:
    for name in ("cnn", "lstm", "transformer"):
        vnet = varify.variationalize(seeded(CASES[name]), estimator="auto")
        args, kwargs = CASES[name].calls[0]
        vnet(*args, **kwargs)  # the first one is recorded
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            output = vnet(*args, **kwargs)
            runs.append((output, gradients(vnet, output.sum() + vnet.prior_loss())))
        assert torch.equal(runs[0][0], runs[1][0])
        assert all(torch.equal(grad, runs[1][1][n]) for n, grad in runs[0][1].items())
