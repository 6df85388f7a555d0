"""Rewrite a torch.fx graph so that its parameters are drawn, or estimated by rules."""

import copy
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from varify.errors import EstimatorError
from varify.estimators.rules import Rule, check_estimator, find_rule
from varify.graph.examples import find_examples
from varify.graph.planning import Decision, decide, uses_of
from varify.graph.tensor_views import view_moments
from varify.weights.moments import Examples
from varify.weights.posterior import GaussianPosterior


def rewrite(
    graph_module: fx.GraphModule,
    posteriors: Mapping[str, GaussianPosterior],
    estimators: Mapping[str, str] | str = "weights",
    *,
    inputs: Sequence[Tensor] = (),
    batch_dim: int = 0,
    strict: bool = False,
) -> fx.GraphModule:
    """A graph in which each parameter that has a posterior is a draw of it, or its moments under an estimator's rules.

    Args:
        graph_module: from `vnet.graph`, `torch.fx.symbolic_trace`, `torch.export` (`.module()`), ...: parameters are
            its `get_attr` nodes, or are within modules that it calls and that torch.fx can trace. It is not changed.
        posteriors: by the parameter's name there, such as `vnet.posteriors`.
        estimators: one for all, or by name.
        inputs: tensors to call it with; required by estimators, to find which rows belong to one example.
        batch_dim: the dimension of `inputs` that counts examples.
        strict: raise where an estimator is unavailable, instead of drawing the weights.

    Returns:
        A runnable module, whose noise is new in each call. `meta["decisions"]` has the `Decision` of each parameter.

    Raises:
        EstimatorError: an unknown estimator, or one without inputs; a module with posteriors that torch.fx can't
            trace; see `strict`.
    """
    chosen = {
        n: check_estimator(estimators if isinstance(estimators, str) else estimators.get(n, "weights"))
        for n in posteriors
    }
    if not inputs and set(chosen.values()) != {"weights"}:
        raise EstimatorError(
            "an estimator needs inputs=(...), tensors to call the graph with, to find which rows belong to one example"
        )
    new = fx.GraphModule(graph_module, _inlined(graph_module, set(posteriors)))
    parameters = {n.target: n for n in new.graph.nodes if n.op == "get_attr" and n.target in posteriors}
    uses = {str(name): uses_of(node) for name, node in parameters.items()}
    nodes = [use.node for name in uses if chosen[name] != "weights" for use in uses[name]]
    examples: dict[fx.Node, Examples | None] = {}
    if nodes:
        values = dict(zip((n.name for n in new.graph.nodes if n.op == "placeholder"), inputs, strict=True))
        _learn_shapes(new, inputs)
        attributes = {str(n.target): _attribute(new, n) for n in new.graph.nodes if n.op in ("get_attr", "call_module")}
        examples = find_examples(new.graph, attributes, values, nodes, batch_dim)
    decisions = decide(uses, chosen, examples)
    refuse(decisions, strict)
    put(new, parameters, decisions, posteriors)
    return new


def refuse(decisions: Mapping[str, Decision], strict: bool) -> None:
    """Raise an EstimatorError if `strict` and a parameter is drawn though an estimator was requested."""
    failed = "; ".join(f"{name}: {decision.why}" for name, decision in decisions.items() if decision.why)
    if failed and strict:
        raise EstimatorError(f"strict=True, and an estimator falls back to drawn weights for {failed}")


def put(
    module: fx.GraphModule,
    parameters: Mapping[str, fx.Node],
    decisions: Mapping[str, Decision],
    posteriors: Mapping[str, GaussianPosterior],
) -> None:
    """Replace `get_attr` nodes of parameters by posteriors, and operations that use moments by rules, in place."""
    graph = module.graph
    vars(module)["posteriors"] = dict(posteriors)
    first = next((n for n in graph.nodes if n.op != "placeholder"), None)
    assert first is not None
    estimated = {name for name, decision in decisions.items() if decision.uses or decision.unseen}
    with graph.inserting_before(first):
        source = graph.create_node("get_attr", "posteriors")
        # draws first, in the order of the posteriors: as in a forward, so that a seed gives the same numbers
        stand_ins = {}
        for name in [*(n for n in posteriors if n not in estimated), *(n for n in posteriors if n in estimated)]:
            if name not in parameters and name in estimated:
                continue
            label = name.replace(".", "_")
            q = graph.create_node("call_function", operator.getitem, (source, name), name=f"q_{label}")
            if name in estimated:
                shared: dict[str, Any] = {"keeping": _number(decisions[name])} if decisions[name].keeps else {}
                stand_ins[name] = graph.create_node("call_method", "moments", (q,), shared, name=label)
            else:
                stand_ins[name] = graph.create_node("call_method", "rsample", (q,), name=label)
    for name, node in parameters.items():
        node.replace_all_uses_with(stand_ins[name])
        graph.erase_node(node)
    _insert_rules(graph, decisions)
    module.meta["decisions"] = dict(decisions)
    module.recompile()


def _number(decision: Decision) -> int:
    """The number of examples at its uses."""
    return max(examples.number for _, examples in decision.uses)


def _insert_rules(graph: fx.Graph, decisions: Mapping[str, Decision]) -> None:
    rules: dict[fx.Node, tuple[Rule, Examples]] = {}
    viewed: dict[fx.Node, fx.Node] = {}
    for decision in decisions.values():
        for use, examples in decision.uses:
            rule = find_rule(decision.estimator, use.operation)
            if rule is not None:
                rules[use.node] = rule, examples
            _view_moments(graph, use.source, len(use.path), viewed)
    for node, (rule, examples) in rules.items():
        with graph.inserting_before(node):
            new = graph.create_node("call_function", rule.function, (examples, *node.args), dict(node.kwargs))
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _view_moments(graph: fx.Graph, node: fx.Node, steps: int, viewed: dict[fx.Node, fx.Node]) -> None:
    """Replace the last `steps` views before an operation by views of moments; `viewed` has those replaced so far."""
    for _ in range(steps):
        node = viewed.get(node, node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if node.target is not view_moments and not _makes_parts(source):
            name, *further = (str(node.args[1]),) if node.target is getattr else (_name(node), *node.args[1:])
            with graph.inserting_before(node):
                new = graph.call_function(view_moments, (source, name, *further), node.kwargs)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            viewed[node] = new
        node = source


def _makes_parts(node: fx.Node) -> bool:
    name = node.args[1] if node.target is view_moments else _name(node)
    return name in ("chunk", "split", "unbind")


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


# --- graphs that were not recorded


class _Through(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """No module is a leaf: their parameters must be nodes of the graph."""
        return False


def _inlined(module: fx.GraphModule, names: set[str]) -> fx.Graph:
    """A copy of the graph in which modules with a parameter of `names` are not called but inlined."""
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "call_module" and any(name.startswith(f"{node.target}.") for name in names):
            copies[node] = _inlined_call(graph, module, node, copies)
        elif node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], lambda n: copies[n]))
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    return graph


def _inlined_call(graph: fx.Graph, module: fx.GraphModule, call: fx.Node, copies: dict[fx.Node, Any]) -> Any:
    part = module.get_submodule(str(call.target))
    try:
        inner = _Through().trace(part)
    except Exception as error:
        raise EstimatorError(
            f"{call.target}, a {type(part).__name__}, has posteriors, and torch.fx can't trace it ({error}); "
            "vnet.graph(*inputs) records it"
        ) from error
    positional = [copies.get(a, a) if isinstance(a, fx.Node) else a for a in call.args]
    named = {key: copies.get(a, a) if isinstance(a, fx.Node) else a for key, a in call.kwargs.items()}
    values: dict[fx.Node, Any] = {}
    for node in inner.nodes:
        if node.op == "placeholder":
            default = node.args[0] if node.args else None
            values[node] = positional.pop(0) if positional else named.get(str(node.target), default)
        elif node.op == "output":
            return fx.node.map_arg(node.args[0], lambda n: values[n])
        else:
            values[node] = new = graph.node_copy(node, lambda n: values[n])
            if node.op in ("get_attr", "call_module"):
                new.target = f"{call.target}.{node.target}"
    return None


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shapes of its nodes, by name."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and note the shape of its value."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n.name] = tuple(result.shape)
        return result


def _learn_shapes(module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    shapes = _Shapes(copy.deepcopy(module))  # a copy, since batch normalization updates its statistics
    with torch.no_grad(), torch.random.fork_rng([t.device.index for t in inputs if t.is_cuda]):
        shapes.run(*inputs)
    for node in module.graph.nodes:
        if node.name in shapes.shapes:
            node.meta["shape"] = shapes.shapes[node.name]


def _attribute(module: nn.Module, node: fx.Node) -> Any:
    """The value that a node gets, or a copy of the module that it calls.

    Batch normalization is in eval mode there: with the statistics of the batch, each row would depend on all examples.
    """
    value = functools.reduce(getattr, str(node.target).split("."), module)
    if node.op == "get_attr":
        return value
    value = copy.deepcopy(value)
    for part in value.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()
    return value
