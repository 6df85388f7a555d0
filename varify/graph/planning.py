"""What each parameter meets in a graph, and which estimator serves it there."""

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
    """One operation that a parameter meets.

    Attributes:
        node: in the graph.
        source: the argument there that is the parameter, or a view of it.
        path: from the parameter to `source`.
        operation: as rules are kept under.
    """

    node: fx.Node
    source: fx.Node
    path: Path
    operation: Any


def uses_of(parameter: fx.Node) -> list[Use]:
    """The operations that a parameter meets, also by views of it, in the order in which they run."""
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
        return None  # what comes of it has no gradient, or that of an autograd.Function
    if user.target is getattr:
        return step(str(user.args[1]), (), {})
    return step(_name(user.target), user.args[1:], user.kwargs)


def _name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _operation(node: fx.Node) -> Any:
    return canonical(node.target) if node.op in ("call_function", "call_method") else node.op


@dataclass
class Decision:
    """How a parameter takes part in a call.

    Attributes:
        estimator: "weights" if it is drawn.
        why: why it is drawn although something else was wanted; else empty.
        uses: that meet its moments, with the examples of each, in the order in which they run.
        keeps: several of them, which share one noise.
        automatic: "auto" was wanted: which estimator it is follows from the shapes of each call.
        unseen: no operation used it in the recorded call: the first that does will be recorded.
    """

    estimator: str = "weights"
    why: str = ""
    uses: list[tuple[Use, Examples]] = field(default_factory=list)
    keeps: bool = False
    automatic: bool = False
    unseen: bool = False

    @functools.cached_property
    def foreseen(self) -> dict[Path, list[tuple[Any, Examples]]]:
        """By the way from the parameter, the operations that meet it and their examples."""
        found: dict[Path, list[tuple[Any, Examples]]] = {}
        for use, examples in self.uses:
            found.setdefault(use.path, []).append((use.operation, examples))
        return found


def decide(
    uses: Mapping[str, list[Use]], estimators: Mapping[str, str], examples: Mapping[fx.Node, Examples | None]
) -> dict[str, Decision]:
    """The decision for every parameter that has an estimator other than "weights".

    Args:
        uses: of each parameter.
        estimators: by parameter.
        examples: of the operations that they meet; None where rows depend on several.
    """
    decisions = {
        name: _decide_one(uses.get(name, []), estimator, examples)
        for name, estimator in estimators.items()
        if estimator != "weights"
    }
    return _with_those_along(decisions, uses, examples, estimators)


def _decide_one(uses: list[Use], estimator: str, examples: Mapping[fx.Node, Examples | None]) -> Decision:
    if not uses:
        return Decision(why="no operation was seen to use it", unseen=True)
    if not all(use.node.meta.get("gradients", True) for use in uses):
        return Decision(why=GRADIENTS_ARE_OFF)
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
    given = [one for one in (*use.node.args, *use.node.kwargs.values()) if isinstance(one, fx.Node)]
    if not all(one.meta.get("dense", True) for one in given):
        return f"{_name(use.operation)} is of sparse or nested tensors"
    arguments = arguments_of(rule, use)
    if arguments is None or not any(arguments.get(argument) is use.source for argument in rule.of):
        return f"{estimator} has no rule for it as this argument of {_name(use.operation)}"
    return rule.refuses(_shapes(arguments)) or ""


def arguments_of(rule: Rule, use: Use) -> dict[str, Any] | None:
    """The operation's arguments by the rule's names; None if they don't fit."""
    try:
        return rule.arguments(use.node.args, use.node.kwargs)
    except TypeError:
        return None


class _Like:
    """What has the shape of a value."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


def _shapes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _Like(v.meta["shape"]) if isinstance(v, fx.Node) and "shape" in v.meta else v
        for key, v in arguments.items()
    }


def _once(uses: list[Use], examples: Mapping[fx.Node, Examples | None]) -> bool:
    """Whether each example uses every element once at most, so that noises of the outputs are independent anyhow."""
    for use in uses:
        rule, known = find_rule("local", use.operation), examples[use.node]
        arguments = arguments_of(rule, use) if rule else None
        if rule is None or arguments is None or not is_once(rule, _shapes(arguments), known):
            return False
    return True


def is_once(rule: Rule, arguments: dict[str, Any], examples: Examples | None) -> bool:
    """Whether each example uses every element once at most in one operation; None: its rows depend on several."""
    times = rule.uses(arguments)
    return times == 1 or (
        times is not None and examples is not None and examples.dim is not None and times == examples.number
    )


def _disjoint(uses: list[Use]) -> bool:
    """Whether they meet different parts: pieces of one split, or different rows."""
    paths = [use.path for use in uses]
    if not all(paths) or len(set(paths)) < len(paths):
        return False
    if all(path[0][0] == "getitem" and path[0][1].strip("(),").isdigit() for path in paths):
        return len({path[0] for path in paths}) == len(paths)
    pieces = {path[1] for path in paths if len(path) > 1}
    return len({path[0] for path in paths}) == 1 and len(pieces) == len(paths)


def _inconsistent(served: list[tuple[Use, Examples]]) -> str:
    """Why several uses can't share one noise; empty if they can."""
    if len({(e.number, e.dim is None) for _, e in served}) > 1:
        return "of examples and of none"
    if len({(use.path, use.operation, e) for use, e in served}) > len({(use.path, use.operation) for use, _ in served}):
        return "with examples along different dimensions"  # a checkpoint may run any of them again
    if len({(use.operation, e.dim, e.minor) for use, e in served}) > len({use.operation for use, _ in served}):
        return "with examples in different dimensions"  # a use that runs again would not be told from the others
    if any(use.operation in ("add", "mul") for use, _ in served) and len({use.operation for use, _ in served}) > 1:
        return "by different operations"
    if any(taken[0] not in TRANSPOSES | CASTS for use, _ in served for taken in use.path):
        return "of different shapes"
    return ""


def _with_those_along(
    decisions: dict[str, Decision],
    uses: Mapping[str, list[Use]],
    examples: Mapping[fx.Node, Examples | None],
    estimators: Mapping[str, str],
) -> dict[str, Decision]:
    """A bias goes with its weight: the rule of the operation takes both."""
    meets: dict[fx.Node, tuple[Decision, Rule, Use]] = {}
    for decision in decisions.values():
        for use, _ in decision.uses:
            rule = find_rule(decision.estimator, use.operation)
            if rule is not None:
                meets.setdefault(use.node, (decision, rule, use))
    for name, decision in decisions.items():
        if decision.uses or not uses.get(name):
            continue
        found = [(use, meets.get(use.node)) for use in uses[name]]
        owners = {id(met[0]): met[0] for _, met in found if met is not None}
        if len(owners) != 1 or any(met is None for _, met in found):
            continue
        (owner,) = owners.values()
        if not all(met is not None and _is_along(met[1], met[2], use) for use, met in found):
            continue
        if len(found) > 1 and not owner.keeps and not _disjoint(uses[name]):
            continue
        decisions[name] = Decision(
            owner.estimator,
            uses=[(use, examples[use.node] or Examples()) for use, _ in found],
            keeps=owner.keeps,
            automatic=owner.automatic,
        )
    return decisions


def _is_along(rule: Rule, use: Use, bias: Use) -> bool:
    arguments = arguments_of(rule, use) or {}
    return any(arguments.get(argument) is bias.source for argument in rule.along)
