"""The pass: from a traced graph to a program, a pure function of one draw of the weights and the call's tensors."""

import itertools
import linecache
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from varify.calls import Layout
from varify.errors import EstimatorError
from varify.estimators import Rule, automatic, find
from varify.swapping import run_with
from varify.tracing import Trace

_NUMBERS = itertools.count()


@dataclass
class Program:
    """A network's forward with its weights as an argument.

    It holds no module and no tensor: opaque modules, buffers and deterministic parameters are looked up in the live
    network at every run.

    Attributes:
        source: the function as Python.
        estimators: by parameter, its estimator and, if it is not the one wanted, the reason.
        opaque: path of each module that it runs as it is, and why.
        sets_attributes: it changes attributes of the network, so how often it runs matters.
        needs_shapes: it serves only calls with tensors of the shapes it was made for.
        one_by_one: several draws were found not to run at once.
        swaps: it puts weights into modules of the live network while it runs.
    """

    source: str
    estimators: dict[str, tuple[str, str]]
    opaque: dict[str, str]
    needs_shapes: bool
    sets_attributes: bool
    swaps: bool
    _function: Callable[..., Any]
    _unpack: Callable[[Any], Any]
    _layout: Layout | None
    one_by_one: bool = False

    def tensors_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """What to run it on for a call of the layout it was made for; any call will do where it was made for any."""
        return [args, dict(kwargs)] if self._layout is None else self._layout.tensors_of(args, kwargs)

    def call_of(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` of the call that `tensors` are of."""
        return (tensors[0], tensors[1]) if self._layout is None else self._layout.rebuild(tensors)

    def __call__(self, holder: torch.nn.Module, theta: Mapping[str, Any], tensors: Sequence[Tensor]) -> Any:
        """Run it.

        Args:
            holder: has the network as `module`.
            theta: by name, a draw of every chosen parameter, or its `Moments` where it has another estimator.
            tensors: the distinct tensors of the call.
        """
        return self._unpack(self._function(holder, theta, *tensors))


def rewrite(
    trace: Trace, chosen: Iterable[str], wanted: Mapping[str, str] | None = None, strict: bool = False
) -> Program:
    """Make every use of a chosen parameter one of the entry of `theta` with its name; `trace.graph` is consumed.

    Args:
        trace: of one kind of call.
        chosen: names of the parameters.
        wanted: estimator by name; "weights", a draw, where there is none.
        strict: raise where a wanted estimator can't be had, in place of falling back to a draw.

    Raises:
        EstimatorError: see `strict`.
    """
    graph = trace.graph
    parameters = {
        str(node.target).removeprefix("module."): node
        for node in graph.nodes
        if node.op == "get_attr" and str(node.target).startswith("module.")
    }
    parameters = {name: parameters[name] for name in chosen if name in parameters}
    plans = _plan(parameters, wanted or {}, trace)
    plans |= {name: Plan(why="it is not used") for name in wanted or {} if name not in parameters}
    failed = {name: plan.why for name, plan in plans.items() if plan.why}
    if failed and strict:
        told = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise EstimatorError(f"strict=True, and an estimator falls back to drawn weights for {told}")
    with graph.inserting_before(next(iter(graph.nodes))):
        theta = graph.placeholder("theta")
    for user, plan in {plan.user: plan for plan in plans.values() if plan.user is not None}.items():
        _estimate(graph, user, plan)
    for name, node in parameters.items():
        with graph.inserting_before(node):
            entry = graph.create_node("call_function", operator.getitem, (theta, name), name=name.replace(".", "_"))
        node.replace_all_uses_with(entry)
        graph.erase_node(node)
    return _compile(graph, trace, plans)


@dataclass(frozen=True)
class Plan:
    """What a parameter is to its program.

    Attributes:
        estimator: its estimator; "weights" if it is drawn.
        why: why it is drawn although something else was wanted; else empty.
        user: the operation that takes its moments, by `rule`.
    """

    estimator: str = "weights"
    why: str = ""
    user: fx.Node | None = None
    rule: Rule | None = None


def _plan(parameters: Mapping[str, fx.Node], wanted: Mapping[str, str], trace: Trace) -> dict[str, Plan]:
    names: dict[Any, str] = {node: name for name, node in parameters.items()}
    plans: dict[str, Plan] = {}
    taken: set[fx.Node] = set()
    for name, node in parameters.items():
        plan = _plan_one(node, wanted.get(name, "weights"), trace)
        if plan.user is not None and plan.user in taken:
            plan = Plan(why="it meets another variational parameter in one operation")
        taken |= {plan.user} if plan.user is not None else set()
        plans[name] = plan
    # A bias goes with its weight: their variances are added in one operation.
    for plan in list(plans.values()):
        if plan.user is None or plan.rule is None:
            continue
        arguments = plan.rule.arguments(plan.user.args, plan.user.kwargs)
        for argument in plan.rule.along:
            bias = names.get(arguments.get(argument))
            if bias is not None and len(parameters[bias].users) == 1 and wanted.get(bias, "weights") != "weights":
                plans[bias] = plan
    return plans


def _plan_one(node: fx.Node, wanted: str, trace: Trace) -> Plan:
    """The plan of a parameter by itself."""
    if wanted == "weights":
        return Plan()
    if len(node.users) != 1:
        return Plan(why=f"it has {len(node.users)} uses")
    (user,) = node.users
    if user.target is run_with:
        path = str(user.args[0].target).removeprefix("module").removeprefix(".")  # type: ignore[union-attr]
        return Plan(why=f"{path or 'the network'} is run as it is ({trace.opaque.get(path, '')})")
    estimator = wanted
    if wanted == "auto":
        estimator = automatic(user.target, _input_dim(user, node))
    rule = find(estimator, user.target)
    operation = getattr(user.target, "__name__", str(user.target))
    if rule is None:
        return Plan(why=f"{estimator} has no rule for {operation}")
    arguments = rule.arguments(user.args, user.kwargs)
    if not any(arguments.get(argument) is node for argument in rule.of):
        return Plan(why=f"{estimator} has no rule for it as this argument of {operation}")
    refused = rule.refuses({k: v.meta["value"] if isinstance(v, fx.Node) else v for k, v in arguments.items()})
    return Plan(why=refused) if refused else Plan(estimator, user=user, rule=rule)


def _input_dim(user: fx.Node, parameter: fx.Node) -> int:
    values = [n.meta["value"] for n in user.all_input_nodes if n is not parameter and n.op != "get_attr"]
    return max((value.dim() for value in values if isinstance(value, Tensor)), default=0)


def _estimate(graph: fx.Graph, user: fx.Node, plan: Plan) -> None:
    """Put the rule in the place of the operation."""
    assert plan.rule is not None
    with graph.inserting_before(user):
        node = graph.call_function(plan.rule.function, user.args, user.kwargs)
    user.replace_all_uses_with(node)
    graph.erase_node(user)


def _compile(graph: fx.Graph, trace: Trace, plans: Mapping[str, Plan]) -> Program:
    code = graph.python_code("self")
    source = code.src.strip().replace(" -> typing_Any:", ":") + "\n"
    name = f"<varify program {next(_NUMBERS)}>"
    namespace = dict(code.globals)
    exec(compile(source, name, "exec"), namespace)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for tracebacks
    told = {name: (plan.estimator, plan.why) for name, plan in plans.items()}
    return Program(
        source,
        told,
        trace.opaque,
        trace.needs_shapes,
        trace.sets_attributes,
        any(node.target is run_with for node in graph.nodes),
        namespace["forward"],
        trace.unpack,
        trace.layout,
    )
