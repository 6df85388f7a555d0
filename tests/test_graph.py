"""The torch.fx pass: calls recorded as graphs, graphs with posteriors in them, and who is an example."""

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import varify
from tests.networks import CASES, seeded
from varify.graph import rewrite
from varify.graph.examples import find_examples
from varify.graph.recording import Recording, placeholders
from varify.weights.moments import Examples

# --- recording


def recorded(network: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Recording]:
    state = dict(network.named_parameters()) | dict(network.named_buffers())
    recording = Recording(placeholders(args, kwargs), {id(t): (t, n) for n, t in state.items()}, state)
    with recording:
        output = network(*args, **kwargs)
    recording.finish(output)
    return output, recording


class Everyday(nn.Module):
    """Views, in-place operations, item assignment, blocks, branches on data, constants and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.table = nn.Linear(3, 4), torch.arange(4.0)
        self.register_buffer("scale", torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.fc(x)
        h += 1
        h[:, 0] = 7.0
        first, second = h.chunk(2, dim=1)
        with torch.no_grad():
            frozen = h * self.scale
        if x.sum() > -1e9:
            first = first.sin()
        return {"a": torch.cat([first, second], 1).T @ frozen, "n": 3, "b": (h + self.table, h.max(1).values)}


def test_a_record_run_again_is_the_call() -> None:
    net, x = Everyday(), torch.randn(5, 3)
    output, recording = recorded(net, x)
    state = dict(net.named_parameters()) | dict(net.named_buffers()) | recording.constants
    module = fx.GraphModule(
        {n.target: state[n.target] for n in recording.graph.nodes if n.op == "get_attr"}, recording.graph
    )
    again = module(x)
    expected = [output["a"], *output["b"]]
    assert len(again) == 3
    for one, other in zip(again, expected, strict=True):
        assert torch.equal(one, other)
        assert one.requires_grad == other.requires_grad
    assert recording.decisions == ["bool(gt) = True"]


def test_no_op_casts_and_contiguous_are_not_recorded() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.contiguous().float(), self.fc.weight.float().contiguous(), self.fc.bias)

    _, recording = recorded(Casting(), torch.randn(2, 3))
    assert [n.op for n in recording.graph.nodes] == ["placeholder", "get_attr", "get_attr", "call_function", "output"]


def test_recording_changes_no_random_number_and_code_leaves_nothing_behind() -> None:
    vnet = varify.variationalize(seeded(CASES["cnn"]), estimator="auto")
    args, kwargs = CASES["cnn"].calls[0]
    before = {name: value.clone() for name, value in vnet.state_dict().items() if isinstance(value, Tensor)}
    state = torch.get_rng_state()
    code = vnet.code(*args, **kwargs)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(vnet.state_dict()[name], value) for name, value in before.items())
    assert "flipout_conv2d" in code
    assert "local_linear" in code
    assert "def forward(self, x0)" in code
    assert "rsample" in vnet.eval().code(*args, **kwargs)  # estimators are for training
    with pytest.raises(ValueError, match="inputs of the network are needed"):
        vnet.code()


def test_code_tells_what_data_decided() -> None:
    vnet = varify.variationalize(Everyday())
    assert vnet.code(torch.randn(5, 3)).startswith("# data decided: bool(gt) = True\ndef forward(self, x0):")


# --- graphs with posteriors


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.scale = nn.Conv1d(2, 3, 2), nn.Linear(6, 2), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).flatten(1)) * self.scale


def without_sigma(vnet: varify.VariationalModule) -> varify.VariationalModule:
    for q in vnet.posteriors.values():
        q.rho.data.fill_(-200.0)
    return vnet


GRAPHS = {
    "symbolic_trace": lambda net, x: fx.symbolic_trace(net),
    "export": lambda net, x: torch.export.export(net, (x,)).module(),
}


@pytest.mark.parametrize("estimator", ["weights", "local", "flipout", "auto"])
@pytest.mark.parametrize("of", ["symbolic_trace", "export"])
def test_a_custom_graph_takes_posteriors(of: str, estimator: str) -> None:
    torch.manual_seed(1)  # a network of six units, not all of which are dead for the example that is changed
    net, x = Small(), torch.randn(4, 2, 3)
    vnet = varify.variationalize(net, init=varify.inits.Constant(0.3))
    graph = GRAPHS[of](net, x)
    code = str(graph.code)
    new = rewrite(graph, vnet.posteriors, estimator, inputs=(x,), strict=True)
    assert str(graph.code) == code
    assert not torch.equal(_one(new(x)), _one(new(x)))
    reached = {name: d.estimator for name, d in new.meta["decisions"].items()}
    if estimator == "auto":
        assert reached["conv.weight"] == "flipout"
        assert reached["fc.weight"] == reached["fc.bias"] == "local"
    _one(new(x)).sum().backward()
    assert all(q.mu.grad is not None and q.rho.grad.any() for q in vnet.posteriors.values())
    still = rewrite(GRAPHS[of](net, x), without_sigma(vnet).posteriors, estimator, inputs=(x,))
    torch.testing.assert_close(_one(still(x)), net(x))


def _one(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_a_rewritten_graph_has_the_moments_of_drawn_weights() -> None:
    torch.manual_seed(0)
    net, x = Small(), torch.randn(2, 2, 3)
    vnet = varify.variationalize(net, init=varify.inits.Constant(0.2))
    module = rewrite(fx.symbolic_trace(net), vnet.posteriors, "auto", inputs=(x,))
    with torch.no_grad():
        of_rules = torch.stack([module(x) for _ in range(4000)])
        of_draws = torch.stack([vnet(x) for _ in range(4000)])
    for power in (1, 2):
        one, other = of_rules**power, of_draws**power
        z = (one.mean(0) - other.mean(0)) / ((one.var(0) + other.var(0)) / 4000).sqrt()
        assert z.abs().max() < 4.5  # of 8 numbers: false alarm 1 in 18,000


def test_an_estimator_needs_inputs_and_a_known_name() -> None:
    vnet, graph = varify.variationalize(Small()), fx.symbolic_trace(Small())
    rewrite(graph, vnet.posteriors)
    with pytest.raises(varify.EstimatorError, match=r"needs inputs=\(\.\.\.\)"):
        rewrite(graph, vnet.posteriors, {"fc.weight": "local"})
    with pytest.raises(varify.EstimatorError, match=r"estimator must be one of .*, got 'lokal'"):
        rewrite(graph, vnet.posteriors, "lokal")


def test_finding_examples_leaves_the_modules_of_a_graph_alone() -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), torch.randn(4, 3)
    graph = fx.symbolic_trace(net)
    vnet = varify.variationalize(net, where=["0.*", "2.*"])
    rewrite(graph, vnet.posteriors, "auto", inputs=(x,), strict=True)
    assert net[1].num_batches_tracked == 0
    assert torch.equal(net[1].running_mean, torch.zeros(4))


def test_a_layer_that_no_graph_can_hold_is_named() -> None:
    net = nn.Sequential(nn.GRU(3, 3, batch_first=True))
    vnet = varify.variationalize(net)
    with pytest.raises(varify.EstimatorError, match=r"0, a GRU, has posteriors, and torch.fx can't trace it"):
        rewrite(fx.symbolic_trace(net), vnet.posteriors)


# --- which rows belong to one example


class Rows(nn.Module):
    """A linear layer that meets rows in many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.fc = way, nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, f = x.shape
        if self.way == "as they are":
            return self.fc(x)
        if self.way == "folded":
            return self.fc(x.reshape(b * t, f))
        if self.way == "length first":
            return self.fc(x.transpose(0, 1))
        if self.way == "length first, folded":
            return self.fc(x.transpose(0, 1).reshape(b * t, f))
        if self.way == "pooled":
            return self.fc(x.mean(1))
        if self.way == "no example":
            return x + self.fc(torch.ones(3, t, f)).mean(0)
        return self.fc(x - x.mean(0))  # mixed


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("as they are", Examples(3, 0)),
        ("folded", Examples(3, 0)),
        ("length first", Examples(3, 1)),
        ("length first, folded", Examples(3, 0, minor=True)),
        ("pooled", Examples(3, 0)),
        ("no example", Examples(3)),
        ("mixed", None),
    ],
)
def test_rows_are_found_to_be_an_examples(way: str, expected: Examples | None) -> None:
    net, x = Rows(way), torch.randn(3, 5, 4)
    _, recording = recorded(net, x)
    (node,) = [n for n in recording.graph.nodes if n.target is F.linear]
    values = dict(net.named_parameters()) | recording.constants
    found = find_examples(recording.graph, values, {"x0": x}, [node], 0)[node]
    assert found == expected


@pytest.mark.parametrize("way", ["as they are", "folded", "length first", "length first, folded"])
@pytest.mark.parametrize("estimator", ["flipout", "auto"])
def test_positions_of_one_example_see_one_weight_and_examples_do_not(way: str, estimator: str) -> None:
    torch.manual_seed(1)
    vnet = varify.variationalize(Rows(way), estimator=estimator, init=varify.inits.Constant(0.5))
    x = torch.randn(2, 1, 4).expand(2, 3, 4)  # all positions of an example are alike
    vnet(x)
    with torch.no_grad():
        out = torch.stack([vnet(x) for _ in range(2000)])
    if "length" in way:
        out = out.reshape(2000, 3, 2, 4).transpose(1, 2)
    out = (out.reshape(2000, 2, 3, 4) - out.reshape(2000, 2, 3, 4).mean(0))[..., 0]
    torch.testing.assert_close(out[:, :, 0], out[:, :, 1])  # one weight at all positions of an example
    torch.testing.assert_close(out[:, :, 0], out[:, :, 2])
    between = (out[:, 0, 0] * out[:, 1, 0]).mean() / out[:, 0, 0].std() / out[:, 1, 0].std()
    assert between.abs() < 0.1  # 4.5 standard errors of 1/sqrt(2000): flipout's examples are uncorrelated


def test_a_batch_dimension_is_named() -> None:
    x = torch.randn(1, 1, 64).expand(3, 2, 64)  # (length, batch, features)
    for batch_dim, alike in ((1, True), (0, False)):
        vnet = varify.variationalize(nn.Linear(64, 1), estimator="flipout", batch_dim=batch_dim)
        vnet(torch.randn(3, 2, 64))
        out = vnet(x)
        assert torch.allclose(out[0, 0], out[1, 0]) == alike


def test_integer_inputs_are_changed_within_their_values() -> None:
    net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))
    vnet = varify.variationalize(net, estimator="auto", strict=True)
    for tokens in (torch.tensor([[0, 3], [1, 2]]), torch.tensor([[0, 3], [0, 3]])):
        vnet(tokens)
        found = vnet.graph(tokens).meta["decisions"]
        assert [e for _, e in found["0.weight"].uses] == [Examples(2, 0)]


def test_rows_of_no_change_at_all_are_of_no_example() -> None:
    vnet = varify.variationalize(nn.Embedding(4, 3), estimator="flipout")
    zeros = torch.zeros(2, 2, dtype=torch.long)  # nothing else is known to be allowed
    ((_, examples),) = vnet.graph(zeros).meta["decisions"]["weight"].uses
    assert examples.dim is None


def test_batches_of_one_have_their_own_plan() -> None:
    vnet = varify.variationalize(Rows("folded"), estimator="flipout", init=varify.inits.Constant(0.5))
    vnet(torch.randn(1, 3, 4))
    x = torch.randn(2, 3, 4)
    vnet(x), vnet(x)
    assert len(vnet.engine.plans) == 2
    ((_, examples),) = vnet.graph(x).meta["decisions"]["fc.weight"].uses
    assert examples == Examples(2, 0)


# --- several uses


def test_flipout_serves_a_tied_embedding_exactly_for_each_example() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.embedding(ids)), self.embedding.weight)

    torch.manual_seed(0)
    vnet = varify.variationalize(Tied(), estimator="flipout", strict=True, init=varify.inits.Constant(0.7))
    ids = torch.tensor([[0, 1, 1], [3, 4, 0]])
    vnet(ids)
    n = 6000
    with torch.no_grad():
        kept = torch.stack([vnet(ids)[0].flatten() for _ in range(n)])  # of one example
        with vnet.sampling():
            drawn = torch.stack([vnet(ids)[0].flatten() for _ in range(n)])
    pairs = [(i, j) for i in range(15) for j in range(i, 15)]
    for one, other in [(kept, drawn)]:
        products = [torch.stack([s[:, i] * s[:, j] for i, j in pairs], 1) for s in (one, other)]
        z = (products[0].mean(0) - products[1].mean(0)) / ((products[0].var(0) + products[1].var(0)) / n).sqrt()
        assert z.abs().max() < 5  # of 120 numbers: false alarm 1 in 14,000
        z = (one.mean(0) - other.mean(0)) / ((one.var(0) + other.var(0)) / n).sqrt()
        assert z.abs().max() < 5


def test_a_weight_used_twice_under_local_is_drawn_and_reported() -> None:
    layer = nn.Linear(3, 3)
    vnet = varify.variationalize(nn.Sequential(layer, nn.Tanh(), layer), estimator="local")
    vnet(torch.randn(2, 3))
    assert "it has 2 uses" in str(vnet.summary())


def test_the_graph_is_made_of_torch_functions_alone() -> None:
    vnet = varify.variationalize(seeded(CASES["transformer"]), estimator="auto")
    args, kwargs = CASES["transformer"].calls[0]
    module = vnet.graph(*args, **kwargs)
    assert isinstance(module, fx.GraphModule)
    assert not [n for n in module.graph.nodes if n.op == "call_module"]
    assert [n for n in module.graph.nodes if n.target is operator.getitem]
    module(*placeholders(args, kwargs).values())
