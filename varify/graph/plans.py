"""Records of calls, the plans made from them, and calls that follow a plan."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from varify.graph.examples import find_examples
from varify.graph.planning import Decision, Use, decide, uses_of
from varify.graph.recording import Recording
from varify.graph.rewriting import put
from varify.graph.snapshots import Snapshot, Snapshots
from varify.graph.standins import EstimatedParameter, Unforeseen
from varify.network.view import Views
from varify.weights.draw import draw
from varify.weights.posterior import GaussianPosterior


@dataclass
class Record:
    """One recorded call.

    Attributes:
        graph: its placeholders are `inputs`, its get_attr nodes `state` and `constants`.
        decided: the decisions of the call that depended on data, in words.
        inputs: the tensors of the call, by placeholder.
        state: the network's parameters and buffers in the call, by name.
        constants: tensors and objects from elsewhere, by name.
        written: names of parameters and buffers that the call wrote into, or may have.
    """

    graph: fx.Graph
    decided: list[str]
    inputs: dict[str, Tensor]
    state: dict[str, Tensor]
    constants: dict[str, Any]
    written: set[str]

    def examples(self, nodes: list[fx.Node], batch_dim: int) -> Any:
        """See `find_examples`."""
        return find_examples(self.graph, self.state | self.constants, self.inputs, nodes, batch_dim)

    def parameters(self, names: Mapping[str, Any]) -> dict[str, fx.Node]:
        """The get_attr nodes of the parameters among `names` that the call used."""
        return {str(n.target): n for n in self.graph.nodes if n.op == "get_attr" and n.target in names}

    def module(
        self, decisions: Mapping[str, Decision], posteriors: Mapping[str, GaussianPosterior], live: nn.Module
    ) -> fx.GraphModule:
        """The record as a module: parameters as decided; all other tensors are those of the live network."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, copies)
        graph.output(output)
        now = dict(live.named_parameters(remove_duplicate=False)) | dict(live.named_buffers(remove_duplicate=False))
        used = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
        module = fx.GraphModule(
            {name: now[name] if name in now else self.constants[name] for name in used}, graph, type(live).__name__
        )
        nodes = {str(n.target): n for n in module.graph.nodes if n.op == "get_attr" and n.target in posteriors}
        put(module, nodes, _moved(decisions, copies), posteriors)
        return module


def record(
    network: nn.Module, call: Callable[[nn.Module], Any], inputs: dict[str, Tensor], chosen: Mapping[str, Any]
) -> tuple[Any, Record]:
    """Run a call on `network`, a view with drawn weights, and record it.

    Args:
        network: the view.
        call: runs it.
        inputs: the tensors of the call.
        chosen: names of the variational parameters.

    Returns:
        The output and the record.
    """
    state = dict(network.named_parameters()) | dict(network.named_buffers())
    versions = {name: tensor._version for name, tensor in state.items() if not tensor.is_inference()}
    recording = Recording(inputs, {id(t): (t, name) for name, t in state.items()}, chosen)
    with recording:
        output = call(network)
    recording.finish(output)
    written = {name for name, version in versions.items() if state[name]._version != version}
    written |= {str(node.args[0].target) for node in recording.graph.nodes if _uses_data(node)} & state.keys()
    return output, Record(recording.graph, recording.decisions, inputs, state, recording.constants, written)


def _uses_data(node: fx.Node) -> bool:
    """Whether it reads or sets `.data`, through which writes leave the version counter as it is."""
    return node.target in (getattr, setattr) and node.args[1] == "data" and isinstance(node.args[0], fx.Node)


class Plan:
    """How the parameters take part in one kind of call.

    Attributes:
        decisions: by parameter, of those that have an estimator other than "weights".
        newly_used: parameters that the recorded call did not use and a later one did.
    """

    def __init__(
        self, new: Record, estimators: Mapping[str, str], batch_dim: int, before: "Plan | None" = None
    ) -> None:
        requested = {name: estimator for name, estimator in estimators.items() if estimator != "weights"}
        uses = {name: uses_of(node) for name, node in new.parameters(requested).items()}
        examples = new.examples([use.node for each in uses.values() for use in each], batch_dim)
        self.decisions = decide(uses, requested, examples)
        self.decided = new.decided
        self._written = new.written
        self.newly_used: set[str] = set()
        self._snapshots: Snapshots | None = None
        if before is not None:
            self._take(before)

    def _take(self, before: "Plan") -> None:
        """Keep the decisions of an earlier plan, except for parameters that its recorded call did not use.

        If such a parameter was used by a later call, but does not show in the record of that call either, recording
        cannot see the use (TorchScript), and the parameter is drawn.
        """
        self._written |= before._written
        for name, known in before.decisions.items():
            if not known.unseen:
                self.decisions[name] = known
            elif name in before.newly_used and self.decisions[name].unseen:
                self.decisions[name] = Decision(why="it is used where torch functions are not seen")

    def theta(
        self, posteriors: Mapping[str, GaussianPosterior], count: int | None
    ) -> tuple[dict[str, Any], list[EstimatedParameter]]:
        """What a call has for the parameters, each a draw or a stand-in; and the parameters that have stand-ins."""
        served = {name for name, decision in self.decisions.items() if decision.uses or decision.unseen}
        theta: dict[str, Any] = draw({name: q for name, q in posteriors.items() if name not in served})
        estimated = [
            EstimatedParameter(name, posteriors[name], self.decisions[name], count)
            for name in posteriors
            if name in served
        ]
        theta.update({parameter.name: parameter.stand_in() for parameter in estimated})
        return theta, estimated

    def snapshot(self, network: nn.Module) -> Snapshot:
        """See `Snapshot`."""
        if self._snapshots is None:
            self._snapshots = Snapshots(network, self._written)
        return self._snapshots.take()

    def correct(self, name: str, why: str) -> None:
        """Draw the parameter from now on."""
        self.decisions[name] = Decision(why=why)


def _moved(decisions: Mapping[str, Decision], copies: Mapping[fx.Node, fx.Node]) -> dict[str, Decision]:
    """The decisions with uses in a copy of the graph, given its nodes by those of the original."""

    def moved(use: Use) -> Use:
        return replace(use, node=copies[use.node], source=copies[use.source])

    return {
        name: replace(decision, uses=[(moved(use), examples) for use, examples in decision.uses])
        for name, decision in decisions.items()
    }


def in_transform() -> bool:
    """Whether a transform of torch.func runs, such as vmap or grad."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def run_planned(
    plan: Plan,
    views: Views,
    posteriors: Mapping[str, GaussianPosterior],
    count: int | None,
    call: Callable[[nn.Module], Any],
    recorded: Callable[[], Any],
) -> Any:
    """Run a call with stand-ins, and again where the plan turns out not to foresee it.

    If a rule has drawn its noise for a weight and then other code needs the weight's numbers, a draw would be a second,
    independent sample, and the output that of no single network. So the call is discarded, the state that it may have
    changed is restored, the plan is corrected (the weight is drawn from now on), and the call is made again. Each round
    corrects one parameter, so it ends.

    Args:
        plan: to follow, and to correct.
        views: of the network.
        posteriors: of all its variational parameters.
        count: number of examples.
        call: runs the network that it is given.
        recorded: makes the call recorded, for a new plan, where it uses a parameter that the record did not.
    """
    while True:
        # Attributes that forward sets are dropped with the view. Buffers that it writes in place, lists that it appends
        # to and the random numbers are shared with the live network, so these are saved.
        before = plan.snapshot(views.network)
        theta, estimated = plan.theta(posteriors, count)

        def attempt(network: nn.Module, estimated: list[EstimatedParameter] = estimated) -> Any:
            try:
                return call(network)
            finally:  # TorchScript turns it into another error, and a bare `except:` in the network swallows it
                for parameter in estimated:
                    if parameter.unforeseen:
                        raise Unforeseen(parameter.name, parameter.unforeseen)

        try:
            return views.run(attempt, theta)
        except Unforeseen as use:
            before.restore()
            if plan.decisions[use.name].unseen:
                plan.newly_used.add(use.name)
            else:
                plan.correct(use.name, use.why)
        finally:
            for parameter in estimated:
                parameter.over = True
                if parameter.late:
                    plan.correct(parameter.name, parameter.late)
        if plan.newly_used:
            return recorded()
