"""The plan of each parameter: which operations use it in a record, and which estimator serves it there."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from varify.estimators.rules import Rule, canonical, find_rule
from varify.graph.tensor_views import CASTS, TRANSPOSES, Path, step
from varify.weights.moments import Examples

GRADIENTS_ARE_OFF = "it is used where gradients are off: no_grad, an autograd.Function, a reentrant checkpoint"


@dataclass(frozen=True)
class Use:
    """One operation that uses a parameter.

    Attributes:
        node: the operation.
        source: its argument that is the parameter, or a view of it.
        path: the views from the parameter to `source`.
        operation: its key in the table of rules.
    """

    node: fx.Node
    source: fx.Node
    path: Path
    operation: Any


def uses_of(parameter: fx.Node) -> list[Use]:
    """The operations that use a parameter or a view of it, in the order in which they run."""
    order = {node: i for i, node in enumerate(parameter.graph.nodes)}
    return sorted(_uses(parameter, ()), key=lambda use: order[use.node])


def _uses(source: fx.Node, path: Path) -> Iterator[Use]:
    for user in source.users:
        taken = _step(user, source)
        if taken is None:
            yield Use(user, source, path, _operation(user))
        else:
            yield from _uses(user, (*path, taken))


def _step(user: fx.Node, source: fx.Node) -> tuple[Any, ...] | None:
    if not user.args or user.args[0] is not source or user.op not in ("call_function", "call_method"):
        return None
    if not user.meta.get("gradients", True):
        return None  # a view whose gradient is cut, or that of an autograd.Function: not the parameter's
    if user.target is getattr:
        return step(str(user.args[1]), (), {})
    return step(_name(user.target), user.args[1:], user.kwargs)


def _name(target: object) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _operation(node: fx.Node) -> Any:
    return canonical(node.target) if node.op in ("call_function", "call_method") else node.op


@dataclass
class Decision:
    """How a parameter takes part in a call.

    Attributes:
        estimator: "weights" if it is drawn.
        why: the reason if it is drawn though another estimator was requested; else empty.
        uses: the operations whose rules take its moments, with their examples, in the order in which they run.
        keeps: whether there are several such uses, which must share one noise.
        automatic: whether "auto" was requested, so that the shapes of each call decide on the estimator.
        unseen: whether no operation used it in the recorded call; the first call that does will be recorded.
    """

    estimator: str = "weights"
    why: str = ""
    uses: list[tuple[Use, Examples]] = field(default_factory=list)
    keeps: bool = False
    automatic: bool = False
    unseen: bool = False

    @functools.cached_property
    def foreseen(self) -> dict[Path, list[tuple[Any, Examples]]]:
        """By path from the parameter, the operations that are expected there and their examples, in order."""
        by_path: dict[Path, list[tuple[Any, Examples]]] = {}
        for use, examples in self.uses:
            by_path.setdefault(use.path, []).append((use.operation, examples))
        return by_path


def decide(
    uses: Mapping[str, list[Use]], estimators: Mapping[str, str], examples: Mapping[fx.Node, Examples | None]
) -> dict[str, Decision]:
    """Decide for every parameter that has an estimator other than "weights".

    Args:
        uses: by parameter.
        estimators: by parameter.
        examples: by operation; None where rows depend on several examples.
    """
    decisions = {
        name: _decide_one(uses.get(name, []), estimator, examples)
        for name, estimator in estimators.items()
        if estimator != "weights"
    }
    return _with_biases(decisions, uses, examples)


def _decide_one(uses: list[Use], estimator: str, examples: Mapping[fx.Node, Examples | None]) -> Decision:
    if not uses:
        return Decision(why="no operation was seen to use it", unseen=True)
    if not all(use.node.meta.get("gradients", True) for use in uses):
        return Decision(why=GRADIENTS_ARE_OFF)
    # Uses of one element must see one weight in each example. Only flipout can give them that: its perturbation is a
    # weight's, by a sign for each example, while local's noises belong to the outputs of one operation.
    several, automatic = len(uses) > 1 and not _disjoint(uses), estimator == "auto"
    estimator = ("flipout" if several or not _once(uses, examples) else "local") if automatic else estimator
    if several and estimator != "flipout":
        return Decision(why=f"it has {len(uses)} uses")
    for use in uses:
        why = _refusal(use, estimator)
        if why:
            return Decision(why=why if not several else f"it has {len(uses)} uses, and {why}")
        if examples[use.node] is None and automatic and estimator == "flipout":
            return Decision(why=f"the rows of {_name(use.operation)} depend on several examples")
    served = [(use, examples[use.node] or Examples()) for use in uses]
    if several:
        why = _inconsistent(served)
        if why:
            return Decision(why=f"it has {len(uses)} uses, {why}")
    return Decision(estimator, uses=served, keeps=several, automatic=automatic)


def _refusal(use: Use, estimator: str) -> str:
    rule = find_rule(estimator, use.operation)
    if rule is None:
        return f"{estimator} has no rule for {_name(use.operation)}"
    operands = [arg for arg in (*use.node.args, *use.node.kwargs.values()) if isinstance(arg, fx.Node)]
    if not all(operand.meta.get("dense", True) for operand in operands):
        return f"{_name(use.operation)} is of sparse or nested tensors"
    arguments = arguments_of(rule, use)
    if arguments is None or not any(arguments.get(argument) is use.source for argument in rule.of):
        return f"{estimator} has no rule for it as this argument of {_name(use.operation)}"
    return rule.refuses(_shapes(arguments)) or ""


def arguments_of(rule: Rule, use: Use) -> dict[str, Any] | None:
    """The operation's arguments by the names of the rule's; None if they do not fit its signature."""
    try:
        return rule.arguments(use.node.args, use.node.kwargs)
    except TypeError:
        return None


class _Shaped:
    """A placeholder with the shape of a value, for the shape functions of rules."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


def _shapes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _Shaped(v.meta["shape"]) if isinstance(v, fx.Node) and "shape" in v.meta else v
        for key, v in arguments.items()
    }


def _once(uses: list[Use], examples: Mapping[fx.Node, Examples | None]) -> bool:
    """Whether each example uses every element at most once, so that local's independent output noises are exact."""
    for use in uses:
        rule, known = find_rule("local", use.operation), examples[use.node]
        arguments = arguments_of(rule, use) if rule else None
        if rule is None or arguments is None or not is_once(rule, _shapes(arguments), known):
            return False
    return True


def is_once(rule: Rule, arguments: dict[str, Any], examples: Examples | None) -> bool:
    """Whether each example uses every element of the parameter at most once in this operation.

    Args:
        rule: of the operation.
        arguments: of the operation, or objects that have their shapes.
        examples: None if its rows depend on several examples.
    """
    times = rule.uses(arguments)
    return times == 1 or (
        times is not None and examples is not None and examples.dim is not None and times == examples.number
    )


def _disjoint(uses: list[Use]) -> bool:
    """Whether the uses are of different parts of the parameter: pieces of one split, or different rows."""
    paths = [use.path for use in uses]
    if not all(paths) or len(set(paths)) < len(paths):
        return False
    if all(path[0][0] == "getitem" and path[0][1].strip("(),").isdigit() for path in paths):
        return len({path[0] for path in paths}) == len(paths)
    pieces = {path[1] for path in paths if len(path) > 1}
    return len({path[0] for path in paths}) == 1 and len(pieces) == len(paths)


def _inconsistent(served: list[tuple[Use, Examples]]) -> str:
    """The reason why several uses cannot share one noise; empty if they can."""
    if len({(e.number, e.dim is None) for _, e in served}) > 1:
        return "of examples and of none"
    if len({(use.path, use.operation, e) for use, e in served}) > len({(use.path, use.operation) for use, _ in served}):
        # A checkpoint may run any of the uses again, in any order, and must find which one that is.
        return "with examples along different dimensions"
    if len({(use.operation, e.dim, e.minor) for use, e in served}) > len({use.operation for use, _ in served}):
        return "with examples in different dimensions"  # likewise
    if any(use.operation in ("add", "mul") for use, _ in served) and len({use.operation for use, _ in served}) > 1:
        return "by different operations"
    if any(taken[0] not in TRANSPOSES | CASTS for use, _ in served for taken in use.path):
        return "of different shapes"
    return ""


def _with_biases(
    decisions: dict[str, Decision],
    uses: Mapping[str, list[Use]],
    examples: Mapping[fx.Node, Examples | None],
) -> dict[str, Decision]:
    """Let a bias have the decision of its weight where the weight's rule takes both."""
    served: dict[fx.Node, tuple[Decision, Rule, Use]] = {}
    for decision in decisions.values():
        for use, _ in decision.uses:
            rule = find_rule(decision.estimator, use.operation)
            if rule is not None:
                served.setdefault(use.node, (decision, rule, use))
    for name, decision in decisions.items():
        if decision.uses or not uses.get(name):
            continue
        pairs = [(use, served.get(use.node)) for use in uses[name]]
        owners = {id(weight[0]): weight[0] for _, weight in pairs if weight is not None}
        if len(owners) != 1 or any(weight is None for _, weight in pairs):
            continue
        (owner,) = owners.values()
        if not all(weight is not None and _is_along(weight[1], weight[2], use) for use, weight in pairs):
            continue
        if len(pairs) > 1 and not owner.keeps and not _disjoint(uses[name]):
            continue
        decisions[name] = Decision(
            owner.estimator,
            uses=[(use, examples[use.node] or Examples()) for use, _ in pairs],
            keeps=owner.keeps,
            automatic=owner.automatic,
        )
    return decisions


def _is_along(rule: Rule, use: Use, bias: Use) -> bool:
    """Whether `bias` is an argument that the rule takes along with the weight."""
    arguments = arguments_of(rule, use) or {}
    return any(arguments.get(argument) is bias.source for argument in rule.along)
