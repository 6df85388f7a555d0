"""The pass: from a traced graph to a program, a pure function of one draw of the weights and the call's tensors."""

import itertools
import linecache
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from varify.tracing import Trace

_NUMBERS = itertools.count()


@dataclass
class Program:
    """A network's forward with its weights as an argument.

    It holds no module and no tensor: opaque modules, buffers and deterministic parameters are looked up in the live
    network at every run.

    Attributes:
        source: the function as Python.
        opaque: path of each module that it runs as it is, and why.
        needs_shapes: it serves only calls with tensors of the shapes it was made for.
    """

    source: str
    opaque: dict[str, str]
    needs_shapes: bool
    _function: Callable[..., Any]
    _unpack: Callable[[Any], Any]

    def __call__(self, holder: torch.nn.Module, theta: Mapping[str, Any], tensors: Sequence[Tensor]) -> Any:
        """Run it.

        Args:
            holder: has the network as `module`.
            theta: a draw of every chosen parameter, by name.
            tensors: the distinct tensors of the call.
        """
        return self._unpack(self._function(holder, theta, *tensors))


def rewrite(trace: Trace, chosen: Mapping[str, Any]) -> Program:
    """Replace every use of a chosen parameter by the entry of `theta` with its name; `trace.graph` is consumed."""
    graph = trace.graph
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        theta = graph.placeholder("theta")
    for node in list(graph.nodes):
        name = str(node.target).removeprefix("module.")
        if node.op == "get_attr" and name in chosen and str(node.target).startswith("module."):
            with graph.inserting_before(node):
                drawn = graph.create_node("call_function", operator.getitem, (theta, name), name=name.replace(".", "_"))
            node.replace_all_uses_with(drawn)
            graph.erase_node(node)
    return _compile(graph, trace)


def _compile(graph: fx.Graph, trace: Trace) -> Program:
    code = graph.python_code("self")
    source = code.src.strip().replace(" -> typing_Any:", ":") + "\n"
    name = f"<varify program {next(_NUMBERS)}>"
    namespace = dict(code.globals)
    exec(compile(source, name, "exec"), namespace)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for tracebacks
    return Program(source, trace.opaque, trace.needs_shapes, namespace["forward"], trace.unpack)
