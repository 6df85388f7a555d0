"""What must hold for every architecture: converts, equals the original at sigma = 0, learns, copies, predicts."""

import copy
import io
import pickle
import random
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import varify
from tests.zoo.entries import Call, Entry

CONSTANTS = (bool, int, float, str)
TINY = -200.0  # softplus of it is 0 in single precision


@dataclass
class Record:
    """What was found. `failures` is empty where everything holds."""

    name: str
    parameters: int = 0
    variational: int = 0
    seen: int = 0
    drawn: dict[str, str] = field(default_factory=dict)
    predicts: str = ""
    pickles: bool = True
    seconds: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def sight(self) -> float:
        """Share of the variational weights that a rule reaches."""
        return self.seen / max(1, self.variational)

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())
            self.failures[what] = (
                f"{type(error).__name__}: {text[:300]} ({where.filename.split('/')[-1]}:{where.lineno})"
            )


def examined(group: str, name: str) -> Record:
    """Of one architecture, for a process of its own."""
    from tests import conftest  # noqa: F401  # what torchvision needs
    from tests.zoo import GROUPS

    return examine(name, GROUPS[group].entries()[name])


def examine(name: str, entry: Entry) -> Record:
    """All checks of one architecture; none stops another."""
    record, start = Record(name), time.perf_counter()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = entry.make()
        record.parameters = sum(p.numel() for p in network.parameters())
        with record.noting("converts"):
            vnet = varify.variationalize(network, estimator="weights")  # others have a check of their own
            examine_as(record, entry, network, vnet)
    record.seconds = time.perf_counter() - start
    return record


def examine_as(record: Record, entry: Entry, network: nn.Module, vnet: varify.VariationalModule) -> None:
    call = entry.call()
    again = copy.deepcopy if record.parameters < 1e6 else _itself  # what counts its calls has made none then
    record.variational = sum(q.mu.numel() for q in vnet.posteriors.values())
    with record.noting("mean_model() is the original"):
        mean = vnet.mean_model()
        assert type(mean) is type(network)
        assert_equal(dict(mean.state_dict()), dict(_ordinary(network).state_dict()))
        del mean
    start = tensors_of(vnet)
    reached: set[str] = set()
    for training in (False, True):
        with record.noting(f"equals the original in {'train' if training else 'eval'}"):
            reached, record.pickles = _equals(network, again(vnet), call, training)
        restore(vnet, start)
    with record.noting("gradients reach mu and rho"):
        assert reached or not record.variational
        named = [f"{kind}.{name}" for name in sorted(reached & set(vnet.posteriors)) for kind in ("module", "rho")]
        for seed in range(5):  # stochastic depth may leave a branch out for all of a batch
            _, objective = run(vnet, call, seed)
            objective.backward()
            grads = {name: vnet.get_parameter(name).grad for name in named}
            zero = [name for name, grad in grads.items() if grad is None or not grad.any()]
            if not zero:
                break
        assert not zero, f"none or zero for {', '.join(zero[:3])}"
        vnet.zero_grad()
    with record.noting("KL is finite"):
        kl = vnet.prior_loss()
        assert kl.isfinite()
        assert kl > 0
    with record.noting("copies and pickles"):
        copies = [copy.deepcopy(vnet), *([pickle.loads(pickle.dumps(vnet))] if record.pickles else [])]
        for other in copies:
            assert_equal(dict(other.state_dict()), dict(vnet.state_dict()))
        assert_close(run(copies[-1], call, 1)[0], run(vnet, call, 1)[0])
        del copies, other
        restore(vnet, start)
    with record.noting("state dict round trip"):
        file = io.BytesIO()
        torch.save(vnet.state_dict(), file)
        file.seek(0)
        other = varify.variationalize(network, init=varify.inits.Constant(0.3))
        other.load_state_dict(torch.load(file, weights_only=True))
        assert_equal(dict(other.state_dict()), dict(vnet.state_dict()))
        del other, file
    with record.noting("predicts"):
        record.predicts = _predicts(vnet, call, again)
    del vnet
    examine_with_estimators(record, network, call)


def examine_with_estimators(record: Record, network: nn.Module, call: Call) -> None:
    """With estimator="auto": the original at sigma = 0, the graph equal to the run, and what rules reach."""
    vnet = varify.variationalize(network, estimator="auto", init=varify.inits.Constant(1e-3))
    with record.noting("equals the original with estimators"):
        try:
            _equals_with_estimators(network, vnet, call)
        except AssertionError:  # normalization over two values magnifies the rounding of other kernels
            doubled = pytree.tree_map(lambda x: x.double() if _is_float(x) else x, call)
            _equals_with_estimators(copy_of(network).double(), copy.deepcopy(vnet).double(), doubled)
    with record.noting("the graph is the run"):
        vnet.train()(*copy.deepcopy(call)[0], **copy.deepcopy(call)[1])
        # bitwise in one of several tries: LayerDrop decides by random numbers, and kernels by where memory begins
        assert any(_graph_is_run(vnet, call, seed) for seed in range(4))
    with record.noting("what rules reach"):
        (plan,) = vnet.engine.plans.values()
        sizes = {name: q.mu.numel() for name, q in vnet.posteriors.items()}
        record.seen = sum(sizes[name] for name, decision in plan.decisions.items() if decision.uses)
        record.drawn = {name: decision.why for name, decision in plan.decisions.items() if not decision.uses}


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _equals_with_estimators(network: nn.Module, vnet: varify.VariationalModule, call: Call) -> None:
    plain, still = copy_of(network).train(), copy.deepcopy(vnet).train()
    without_noise(plain), without_noise(still)
    for _ in range(2):  # the first call is recorded, with drawn weights; in the second stand-ins meet rules
        (expected, grads), (found, mine) = _gradients_of(plain, plain, call), _gradients_of(still, still.module, call)
        assert_close(found, expected)
        assert_close(dict(still.module.named_buffers()), dict(plain.named_buffers()))
        largest = max(float(grad.abs().max()) for grad in grads.values() if grad.numel())
        for name, grad in grads.items():
            assert name in mine or not grad.any(), f"{name} has no gradient"
            if grad.any():  # rules add zeros, but in another order
                close = 1e-4 * float(grad.abs().max()) + 1e-5 * largest
                assert torch.allclose(mine[name], grad, 1e-3, close), f"gradient of {name}"


def without_noise(network: nn.Module) -> None:
    """Sigma = 0, in all that is variational within."""
    for part in network.modules():
        if isinstance(part, varify.VariationalModule):
            for name in part.posteriors:
                part.get_parameter(f"rho.{name}").data.fill_(TINY)


def _graph_is_run(vnet: varify.VariationalModule, call: Call, seed: int) -> bool:
    args, kwargs = seeded_call(call, seed)
    graph = copy.deepcopy(vnet).graph(*args, **kwargs)
    held = [
        getattr(graph, str(n.target), None) for n in graph.graph.nodes if n.op == "get_attr" and "." not in n.target
    ]
    if any(isinstance(one, torch.Generator) for one in held):  # which goes on from call to call
        return True
    args, kwargs = seeded_call(call, seed)
    output = vnet(*args, **kwargs)
    args, kwargs = seeded_call(call, seed)
    again = graph(*{id(t): t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}.values())
    found = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    assert len(found) == len(again)
    pairs = [(one.nan_to_num(7.0), other.nan_to_num(7.0)) for one, other in zip(found, again, strict=True)]
    return all(torch.equal(one, other) for one, other in pairs)


def _gradients_of(network: nn.Module, module: nn.Module, call: Call) -> tuple[list[Any], dict[str, Tensor]]:
    """Output and gradients, with random numbers for dropout that the noise of estimators does not shift."""
    module.zero_grad()
    seeding = module.register_forward_pre_hook(lambda *_: torch.manual_seed(5) and None)
    try:
        with mock.patch("varify.graph.standins.noise_of_use", _of_its_own):
            leaves, objective = run(network, call, 0)
            objective.backward()
    finally:
        seeding.remove()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return leaves, grads


@contextmanager
def _of_its_own(*_: Any) -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def _equals(network: nn.Module, vnet: varify.VariationalModule, call: Call, training: bool) -> tuple[set[str], bool]:
    """Compares outputs, gradients and buffers at sigma = 0.

    Returns what the original's gradient reaches, and whether the original can be pickled after a forward.
    """
    plain = copy_of(network).train(training)
    vnet.train(training)
    without_noise(plain), without_noise(vnet)
    expected, objective = run(plain, call, 0)
    objective.backward()
    with vnet.sampling(), vnet.fixed_draw():
        vnet.sample_model()  # draws the noise: below, the same random numbers are left for dropout
        found, objective = run(vnet, call, 0)
        objective.backward()
    assert_close(found, expected)
    assert_close(dict(vnet.module.named_buffers()), dict(plain.named_buffers()))
    grads = {name: p.grad for name, p in plain.named_parameters()}
    largest = max(float(g.abs().max()) for g in grads.values() if g is not None and g.numel())
    reached = set()
    for name, grad in grads.items():
        mine = vnet.module.get_parameter(name).grad
        if grad is None:
            assert mine is None or not mine.any(), f"{name} has a gradient"
        elif grad.numel():
            assert mine is not None, f"{name} has no gradient"
            scale = float(grad.abs().max())
            assert torch.allclose(mine, grad, 1e-3, 1e-4 * scale + 1e-6 * largest), f"gradient of {name}"
            reached |= {name} if scale > 1e-6 * largest else set()  # below are those that rounding alone gives one
    vnet.zero_grad()
    return reached, can_be_pickled(plain)


def _ordinary(network: nn.Module) -> nn.Module:
    """The network with the means of the variational modules in it for these."""
    if not any(isinstance(part, varify.VariationalModule) for part in network.modules()):
        return network
    network = copy_of(network)
    for part in list(network.modules()):
        for name, child in part.named_children():
            if isinstance(child, varify.VariationalModule):
                setattr(part, name, child.mean_model())
    return network


def _itself(vnet: varify.VariationalModule) -> varify.VariationalModule:
    return vnet


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}


@torch.no_grad()
def restore(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in tensors and tensor.shape == tensors[name].shape:  # some networks make a buffer anew in forward
            tensor.copy_(tensors[name])
    module.train()


def can_be_pickled(network: nn.Module) -> bool:
    """Not what has local functions for hooks, nor what torch refuses to, such as parametrized modules."""
    try:
        pickle.dumps(network)
    except Exception:
        return False
    return True


def _predicts(vnet: varify.VariationalModule, call: Call, again: Callable[[Any], Any]) -> str:
    """ "at once" where the draws can be vectorised, else "one by one"; the draws are the same either way."""
    args, kwargs = call
    predictions = {}
    for way in (True, False):
        torch.manual_seed(0)
        own = again(vnet).train()
        predictions[way] = own.predict(*args, n_samples=2, vectorize=way, **kwargs)
        assert own.training
        assert own.module.training
    kinds = {way: _predicted(p) for way, p in predictions.items()}
    assert kinds[True], "nothing was predicted"
    for one, other in zip(kinds[True], kinds[False], strict=True):
        assert one.samples.isfinite().all()
        torch.testing.assert_close(one.samples, other.samples, rtol=1e-3, atol=1e-3)
        assert one.std.shape == one.mean.shape
    assert any(p.samples.std(0).any() for p in kinds[True]), "all draws are equal"
    return "at once" if kinds[True][0].vectorized else "one by one"


def _predicted(prediction: Any) -> list[varify.Prediction]:
    leaves = pytree.tree_leaves(prediction, is_leaf=lambda leaf: isinstance(leaf, varify.Prediction))
    return [leaf for leaf in leaves if isinstance(leaf, varify.Prediction) and leaf.samples.is_floating_point()]


def copy_of(network: nn.Module) -> nn.Module:
    """A copy, also of what copy.deepcopy refuses."""
    from varify.network.copies import copy_network

    return copy_network(network)


def seeded_call(call: Call, seed: int = 3) -> Call:
    """Fresh arguments, with all random generators at a seed."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    return copy.deepcopy(call)


def run(network: nn.Module, call: Call, seed: int) -> tuple[list[Any], Tensor]:
    """The output's leaves, and a weighted sum of its tensors that no normalisation makes constant."""
    args, kwargs = seeded_call(call, seed)
    leaves = pytree.tree_leaves(network(*args, **kwargs))
    weights = torch.Generator().manual_seed(7)
    terms = [
        (leaf * torch.randn(leaf.shape, generator=weights)).sum()
        for leaf in leaves
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad
    ]
    return leaves, torch.stack(terms).sum()


def assert_equal(found: Any, expected: Any) -> None:
    assert_close(found, expected, 0.0, 0.0)


def assert_close(found: Any, expected: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    (found, found_spec), (expected, expected_spec) = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    assert found_spec == expected_spec
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, Tensor):
            scale = float(other.detach().abs().max()) if other.is_floating_point() and other.numel() else 1.0
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol * max(1.0, scale), equal_nan=True)
        else:
            assert type(one) is type(other)
            assert not isinstance(other, CONSTANTS) or one == other
