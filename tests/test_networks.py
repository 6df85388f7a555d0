"""At sigma = 0 a variational network is the original: outputs, gradients, buffers, randomness, in both modes."""

import copy
import io
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import varify
from tests.networks import CASES, Case, seeded

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def run(network: nn.Module, call: Any, seed: int) -> tuple[Any, dict[str, torch.Tensor | None]]:
    """The output and, by name, gradients of the sum of its tensors."""
    torch.manual_seed(seed)
    args, kwargs = copy.deepcopy(call)
    network.zero_grad()
    output = network(*args, **kwargs)
    summands = [t.sum() for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    if summands:
        torch.stack(summands).sum().backward()
    return output, {name: p.grad for name, p in network.named_parameters()}


def assert_same(found: Any, expected: Any) -> None:
    (found, found_spec), (expected, expected_spec) = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    assert found_spec == expected_spec
    for f, e in zip(found, expected, strict=True):
        if isinstance(e, torch.Tensor):
            torch.testing.assert_close(f, e)
        else:
            assert (type(f), f) == (type(e), e)


@in_both_modes
@every_case
def test_without_noise_it_is_the_original(case: Case, training: bool) -> None:
    network = seeded(case).train(training)
    vnet = varify.variationalize(network)
    for q in vnet.posteriors.values():
        q.rho.data.fill_(-200.0)  # softplus(-200) is 0 in float32
    with vnet.sampling(), vnet.fixed_draw():
        vnet.sample_model()  # draws the noise: below, both sides then consume the same random numbers
        for seed, call in enumerate(case.calls):
            expected, expected_grads = run(network, call, seed)
            found, found_grads = run(vnet, call, seed)
            assert_same(found, expected)
            for name, grad in expected_grads.items():
                mine = found_grads[f"module.{name}"]
                assert (mine is None or not mine.any()) if grad is None else torch.allclose(mine, grad, 1e-4, 1e-5), (
                    name
                )
    assert_same(dict(vnet.module.state_dict()), dict(network.state_dict()))


@every_case
def test_the_data_reach_every_mu_and_rho_that_they_reach_in_the_original(case: Case) -> None:
    network = seeded(case)
    vnet = varify.variationalize(network)
    for call in case.calls[:1]:
        _, expected = run(network, call, 0)
        _, found = run(vnet, call, 0)
        for name in vnet.posteriors:
            if expected[name] is not None and expected[name].any():
                assert found[f"module.{name}"].any(), name
                assert found[f"rho.{name}"].any(), name


@every_case
def test_the_users_network_is_not_touched(case: Case) -> None:
    network = seeded(case)
    before = copy.deepcopy(network.state_dict())
    vnet = varify.variationalize(network, init=varify.inits.Normal())
    args, kwargs = case.calls[0]
    vnet(*args, **kwargs)
    vnet.prior_loss().backward()
    assert_same(dict(network.state_dict()), dict(before))
    assert all(p.grad is None for p in network.parameters())


@in_both_modes
@every_case
def test_copies_and_state_dicts_before_and_after_a_forward(case: Case, training: bool) -> None:
    vnet = varify.variationalize(seeded(case).train(training), init=varify.inits.Normal())
    args, kwargs = case.calls[0]
    for _ in ("before a forward", "after it"):
        for copied in (copy.deepcopy(vnet), *([_pickled(vnet)] if case.pickles else [])):
            assert_same(dict(copied.state_dict()), dict(vnet.state_dict()))
            assert_same(run(copied, (args, kwargs), 5), run(copy.deepcopy(vnet), (args, kwargs), 5))
            assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in vnet.parameters()}
        file = io.BytesIO()
        torch.save(vnet.state_dict(), file)
        file.seek(0)
        other = varify.variationalize(seeded(case).train(training), prior=varify.priors.Gaussian(std=3.0))
        other.load_state_dict(torch.load(file, weights_only=True))
        torch.testing.assert_close(other.prior_loss(), vnet.prior_loss())
        with vnet.sampling():
            torch.manual_seed(0)
            vnet(*args, **kwargs)


def _pickled(vnet: varify.VariationalModule) -> varify.VariationalModule:
    return pickle.loads(pickle.dumps(vnet))


@every_case
def test_double_precision(case: Case) -> None:
    args, kwargs = pytree.tree_map(_double, case.calls[0])
    for converted in (
        varify.variationalize(seeded(case).double()),
        varify.variationalize(seeded(case)).double(),
        _after_a_forward(varify.variationalize(seeded(case)), case).double(),
    ):
        output = [t for t in pytree.tree_leaves(converted(*args, **kwargs)) if isinstance(t, torch.Tensor)]
        assert {t.dtype for t in output if t.is_floating_point()} == {torch.float64}
        assert {p.dtype for p in converted.parameters()} == {torch.float64}


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied", "transformer", "raw parameters", "called twice"])
def test_half_precision_keeps_rho_in_single(name: str) -> None:
    case = CASES[name]
    args, kwargs = pytree.tree_map(lambda t: t.bfloat16() if t.is_floating_point() else t, case.calls[0])
    whole = varify.variationalize(seeded(case), init="relative")  # which the weights' own rounding does not change
    rhos = [q.rho.clone() for q in whole.posteriors.values()]
    for vnet in (
        whole.bfloat16(),
        varify.variationalize(seeded(case).bfloat16(), init="relative"),
        _after_a_forward(whole.float(), case).bfloat16(),
    ):
        assert {q.mu.dtype for q in vnet.posteriors.values()} == {torch.bfloat16}
        for rho, q in zip(rhos, vnet.posteriors.values(), strict=True):
            assert torch.equal(q.rho, rho)
        output = vnet(*args, **kwargs)
        assert output.dtype == torch.bfloat16
        loss = output.float().square().mean() + vnet.prior_loss()
        loss.backward()
        assert vnet.prior_loss().dtype == torch.float32
        assert all(p.grad.isfinite().all() for p in vnet.parameters() if p.grad is not None)


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


def _after_a_forward(vnet: varify.VariationalModule, case: Case) -> varify.VariationalModule:
    args, kwargs = case.calls[0]
    vnet(*args, **kwargs)
    return vnet


DRAWING = {
    "python": random.random,
    "python's gauss": lambda: random.gauss(0.0, 1.0),
    "python's choice": lambda: random.choice([1.0, 2.0, 3.0, 4.0, 5.0]),
    "numpy": lambda: float(np.random.rand()),
    "numpy's normal": lambda: float(np.random.normal(size=1)[0]),
    "torch": lambda: float(torch.rand(())),
    "torch on a device": lambda: torch.randint(100, (1,), device="cpu"),
    "torch in place": lambda: torch.empty(1, device="cpu").normal_(),
}


@pytest.mark.parametrize("number", DRAWING.values(), ids=DRAWING.keys())
def test_random_numbers_are_drawn_at_every_call_and_none_by_tracing(number: Any) -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) * number()

    network = nn.Sequential(nn.Linear(2, 2), Drawing())
    vnet = varify.variationalize(network)
    without_sigma(vnet)
    x = torch.ones(1, 2)
    results = []
    with vnet.sampling(), vnet.fixed_draw():
        vnet.sample_model()
        for one in (network, vnet):
            torch.manual_seed(0), random.seed(0), np.random.seed(0)
            results.append(torch.stack([one(x) for _ in range(4)]))
    torch.testing.assert_close(*results)
    assert len({tuple(row.flatten().tolist()) for row in results[0]}) > 1


def without_sigma(vnet: varify.VariationalModule) -> None:
    for q in vnet.posteriors.values():
        q.rho.data.fill_(-200.0)
