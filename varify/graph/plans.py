"""What is known of one kind of call: its record, and how each parameter takes part in it."""

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
from varify.graph.standins import Cell, Unforeseen
from varify.network.view import Views
from varify.weights.draw import draw
from varify.weights.posterior import GaussianPosterior


@dataclass
class Record:
    """One call, recorded.

    Attributes:
        graph: its placeholders are `inputs`, its get_attr nodes `held` and `constants`.
        decided: what data decided, in words.
        inputs: the tensors of the call, by placeholder.
        held: the network's parameters and buffers, by name, as they were in the call.
        constants: tensors and objects that came from elsewhere.
        written: names of those of `held` that the call wrote into, or may have.
    """

    graph: fx.Graph
    decided: list[str]
    inputs: dict[str, Tensor]
    held: dict[str, Tensor]
    constants: dict[str, Any]
    written: set[str]

    def examples(self, nodes: list[fx.Node], batch_dim: int) -> Any:
        """See `find_examples`."""
        # of plain tensors the replay takes copies, so that frozen parameters which the call wrote stay as they are
        own = {name: self.held[name].detach() for name in self.written}
        return find_examples(self.graph, self.held | own | self.constants, self.inputs, nodes, batch_dim)

    def parameters(self, names: Mapping[str, Any]) -> dict[str, fx.Node]:
        """The get_attr nodes of those of `names` that the call used."""
        return {str(n.target): n for n in self.graph.nodes if n.op == "get_attr" and n.target in names}

    def module(
        self, decisions: Mapping[str, Decision], posteriors: Mapping[str, GaussianPosterior], live: nn.Module
    ) -> fx.GraphModule:
        """The record with posteriors for parameters, and the live network's tensors for the others."""
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
        network: to run on.
        call: runs it.
        inputs: the tensors of the call.
        chosen: names of the variational parameters.
    """
    held = dict(network.named_parameters()) | dict(network.named_buffers())
    versions = {name: tensor._version for name, tensor in held.items() if not tensor.is_inference()}
    recording = Recording(inputs, {id(t): (t, name) for name, t in held.items()}, chosen)
    with recording:
        output = call(network)
    recording.finish(output)
    written = {name for name, version in versions.items() if held[name]._version != version}
    written |= {str(node.args[0].target) for node in recording.graph.nodes if _is_of_data(node)} & held.keys()
    return output, Record(recording.graph, recording.decisions, inputs, held, recording.constants, written)


def _is_of_data(node: fx.Node) -> bool:
    """Whether it reads or sets `.data`, which tells no version."""
    return node.target in (getattr, setattr) and node.args[1] == "data" and isinstance(node.args[0], fx.Node)


class Plan:
    """How the parameters take part in one kind of call.

    Attributes:
        decisions: by parameter, of those that have an estimator other than "weights".
        unseen_no_more: parameters that the recorded call did not use and a later one did.
    """

    def __init__(
        self, found: Record, estimators: Mapping[str, str], batch_dim: int, before: "Plan | None" = None
    ) -> None:
        wanted = {name: estimator for name, estimator in estimators.items() if estimator != "weights"}
        uses = {name: uses_of(node) for name, node in found.parameters(wanted).items()}
        examples = found.examples([use.node for each in uses.values() for use in each], batch_dim)
        self.decisions = decide(uses, wanted, examples)
        self.decided = found.decided
        self._written = found.written
        self.unseen_no_more: set[str] = set()
        self._snapshots: Snapshots | None = None
        if before is not None:
            self._take(before)

    def _take(self, before: "Plan") -> None:
        """Keep what an earlier plan knew; what it had not seen is known now, or will not be."""
        self._written |= before._written
        for name, known in before.decisions.items():
            if not known.unseen:
                self.decisions[name] = known
            elif name in before.unseen_no_more and self.decisions[name].unseen:
                self.decisions[name] = Decision(why="it is used where torch functions are not seen")

    def theta(
        self, posteriors: Mapping[str, GaussianPosterior], count: int | None
    ) -> tuple[dict[str, Any], list[Cell]]:
        """What a call is given for the parameters: a draw, or a stand-in; and the cells of the stand-ins."""
        served = {name for name, decision in self.decisions.items() if decision.uses or decision.unseen}
        theta: dict[str, Any] = draw({name: q for name, q in posteriors.items() if name not in served})
        cells = [Cell(name, posteriors[name], self.decisions[name], count) for name in posteriors if name in served]
        theta.update({cell.name: cell.stand_in() for cell in cells})
        return theta, cells

    def snapshot(self, network: nn.Module) -> Snapshot:
        """See `Snapshot`."""
        if self._snapshots is None:
            self._snapshots = Snapshots(network, self._written)
        return self._snapshots.take()

    def correct(self, name: str, why: str) -> None:
        """From now on the parameter is drawn."""
        self.decisions[name] = Decision(why=why)


def _moved(decisions: Mapping[str, Decision], copies: Mapping[fx.Node, fx.Node]) -> dict[str, Decision]:
    """Decisions whose uses are in a copy of the graph."""

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
    """Run a call with stand-ins; again, with the weight drawn, where one meets what the plan does not foresee.

    Args:
        plan: is corrected then.
        recorded: makes the call, and a plan of it that follows this one, where it uses a parameter unseen so far.
        views: of the network.
        posteriors: of all its chosen parameters.
        count: number of examples.
        call: runs the network that it is given.
    """
    while True:
        before = plan.snapshot(views.network)
        theta, cells = plan.theta(posteriors, count)

        def attempt(network: nn.Module, cells: list[Cell] = cells) -> Any:
            try:
                return call(network)
            finally:  # TorchScript makes another error of it, and an `except:` none
                for cell in cells:
                    if cell.unforeseen is not None:
                        raise cell.unforeseen

        try:
            return views.run(attempt, theta)
        except Unforeseen as found:
            before.restore()
            if plan.decisions[found.name].unseen:
                plan.unseen_no_more.add(found.name)
            else:
                plan.correct(found.name, found.why)
        finally:
            for cell in cells:
                cell.over = True
                if cell.late:
                    plan.correct(cell.name, cell.late)
        if plan.unseen_no_more:
            return recorded()
