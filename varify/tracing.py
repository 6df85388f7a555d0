"""From a network and one layout of a call to a torch.fx graph: as deep as fx can see, opaque where it can't.

What fx records wrongly without a word (a branch on the type of a value, a block under `no_grad`, a constant that was
random) is treated as what it can't see at all: the innermost module around it becomes one opaque node, which runs the
user's own code.
"""

import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from varify.calls import CONSTANTS, Layout, Slot, has_hooks
from varify.copies import foreign_parameters, weightless_copy
from varify.hazards import DRAWS, watched
from varify.snapshots import Snapshot
from varify.swapping import run_with
from varify.traced import Recorder, Traced, TracedParameter

# torch.fx patches nn.Module while it traces, so one trace at a time in a process.
_ONE_AT_A_TIME = threading.RLock()
# What draws random numbers that no graph holds.
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
# Always opaque: their settings (p, inplace) are then read at every call and not when the program was made.
_BATCH_NORM = nn.modules.batchnorm._BatchNorm.forward  # which counts its calls
_ALWAYS_OPAQUE = (nn.modules.dropout._DropoutNd, nn.RNNBase, nn.modules.rnn.RNNCellBase, nn.MultiheadAttention)


@dataclass
class Trace:
    """What tracing found out.

    Attributes:
        graph: placeholders are the distinct tensors of the call; everything else is reached from `module`, the name
            under which a variational network keeps the user's.
        unpack: from what the graph returns to what the network returns.
        opaque: path of each opaque module and why it is one.
        layout: of the calls it serves; None: of any.
        sets_attributes: a module was seen to change its own attributes in forward, so how often it runs matters.
        needs_shapes: the graph holds for the traced shapes only (an opaque module returned a container, whose
            length may depend on them).
    """

    graph: fx.Graph
    unpack: Callable[[Any], Any]
    opaque: dict[str, str]
    layout: Layout | None
    needs_shapes: bool
    sets_attributes: bool = False


def trace(network: nn.Module, layout: Layout, tensors: Sequence[Tensor], chosen: Mapping[str, Any]) -> Trace:
    """Trace one call of `network` on a weightless copy; nothing real is run or changed.

    Args:
        network: left alone.
        layout: of the call.
        tensors: the distinct tensors of the call; only their shapes and dtypes are used.
        chosen: names of the parameters that opaque nodes are to be handed from outside.
    """
    tracer, generators = _Tracer(chosen), _Generators()
    with _ONE_AT_A_TIME, _undisturbed():
        try:
            root = _Root(weightless_copy(network), tracer, layout)
            tracer.values = [torch.empty_like(t.detach(), device="meta") for t in tensors]
            graph = tracer.trace(root)
        except Exception as error:  # not even a copy of it can be made
            return opaque_trace(layout, chosen, _reason(error))
        finally:
            if tracer.has_drawn:
                generators.restore()
    return Trace(graph, root.unpack, tracer.opaque, layout, tracer.needs_shapes, tracer.sets_attributes)


def opaque_trace(layout: Layout | None, chosen: Mapping[str, Any], why: str) -> Trace:
    """The whole network as one opaque node. Without a layout it takes `args` and `kwargs` themselves."""
    graph = fx.Graph()
    args: Any
    kwargs: Any
    if layout is None:
        args, kwargs = graph.placeholder("args"), graph.placeholder("kwargs")
    else:
        args, kwargs = layout.rebuild([graph.placeholder(f"x{i}") for i in range(len(layout.kinds))])
    module = graph.create_node("get_attr", "module")
    weights = {name: graph.create_node("get_attr", f"module.{name}") for name in chosen}
    graph.output(graph.create_node("call_function", run_with, (module, weights, args, kwargs)))
    return Trace(graph, _as_is, {"": why}, layout, needs_shapes=False)


def _as_is(output: Any) -> Any:
    return output


class _Root(nn.Module):
    """The network under the name `module`, called with the layout's arguments."""

    def __init__(self, network: nn.Module, tracer: "_Tracer", layout: Layout) -> None:
        super().__init__()
        self.module = network
        self.tracer, self.layout = tracer, layout
        self.unpack: Callable[[Any], Any] = _as_is

    def forward(self, *tensors: Any) -> Any:
        args, kwargs = self.layout.rebuild(tensors)
        before = _numpys_state()
        with Recorder(self.tracer), watched(self.tracer.on_hazard):
            output = self.module(*args, **kwargs)
        if _numpys_state() != before:  # its methods are not seen to be called
            self.tracer.has_drawn = True
            raise TraceError(DRAWS)
        if isinstance(output, fx.Proxy):
            return output
        leaves, spec = pytree.tree_flatten(output)
        traced = [leaf for leaf in leaves if isinstance(leaf, fx.Proxy)]
        places = iter(range(len(traced)))
        slots = [Slot(next(places)) if isinstance(leaf, fx.Proxy) else (type(leaf), leaf) for leaf in leaves]

        def unpack(values: Sequence[Any]) -> Any:
            filled = [values[slot.index] if isinstance(slot, Slot) else slot[1] for slot in slots]
            return pytree.tree_unflatten(filled, spec)

        self.unpack = unpack
        return traced


class _Tracer(fx.Tracer):
    """Goes through every module down to functions, and takes back what it can't follow."""

    def __init__(self, chosen: Mapping[str, Any]) -> None:
        super().__init__()
        self.chosen = chosen
        self.opaque: dict[str, str] = {}
        self.needs_shapes = self.sets_attributes = self.has_drawn = False
        self.values: list[Tensor] = []
        self.asleep = False  # running on weightless values, recording nothing
        self._hazards: list[str] = []
        self._thread = threading.get_ident()
        self._attributes: dict[str, fx.Proxy] = {}
        self._created: list[fx.Node] = []
        self._names: dict[int, str] = {}
        self._ambience: tuple[Any, ...] = ()

    # --- what fx asks of a tracer

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        assert isinstance(self.root, _Root)
        for module_name, module in self.root.named_modules():
            for name, value in [*vars(module).items(), *module._buffers.items(), *module._parameters.items()]:
                if isinstance(value, Tensor):
                    self._names.setdefault(id(value), f"{module_name}.{name}")
        self._ambience = _ambience()
        placeholders = [self.create_proxy("placeholder", f"x{i}", (), {}) for i in range(len(self.values))]
        return root_fn, [self.root, *placeholders]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        if self.asleep or threading.get_ident() != self._thread or id(attr_val) not in self._names:
            return attr_val
        return self._attribute(self._names[id(attr_val)])

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if has_hooks(m):  # hooks are for real values; without them the structure of the output is still seen
            forward = m.forward
        if self.asleep:
            return forward(*args, **kwargs)
        why = self._opaque_from_the_start(m)
        if why is None:
            snapshot, mark, hazards = Snapshot.of(m), len(self._created), len(self._hazards)
            opaque_before, needs_shapes_before = self.opaque.copy(), self.needs_shapes
            try:
                output = forward(*args, **kwargs)
                if len(self._hazards) > hazards:
                    raise TraceError(self._hazards[hazards])
                if snapshot.changed():
                    raise TraceError("its forward sets attributes")
                if m is self.root.module:
                    _check_output(output)
                return output
            except Exception as error:  # whatever it is, the module runs as it is
                why = _reason(error)
            self.sets_attributes |= snapshot.changed()
            self._roll_back(mark)
            del self._hazards[hazards:]
            snapshot.restore()
            self.opaque, self.needs_shapes = opaque_before, needs_shapes_before
        return self._call_opaque(m, forward, args, kwargs, why)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        is_parameter = node.op == "get_attr" and isinstance(node.meta.get("value"), nn.Parameter)
        return (TracedParameter if is_parameter else Traced)(node, self)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
        if kind != "output" and self._ambience != _ambience():
            raise TraceError("part of it runs under no_grad, autocast or a custom autograd function")
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        self._created.append(node)
        if kind != "output":
            node.meta["value"] = self._evaluate(kind, target, node.args, node.kwargs)
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        value = proxy.node.meta["value"]
        if value is None and target is not getattr:
            return None  # as in the network, where code may ask for it
        if type(value) in (tuple, list) and not all(isinstance(v, Tensor) for v in value):
            raise TraceError(f"{target} returns more than tensors")
        return proxy

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            if id(a) not in self._names:
                raise TraceError("it uses a tensor that no module holds")
            return self._attribute(self._names[id(a)]).node
        if isinstance(a, torch.device) and a.type == "meta":
            raise TraceError("it asks a parameter for its device")
        return super().create_arg(a)

    def on_hazard(self, what: str) -> None:
        """A function was entered that could decide something unseen."""
        self.has_drawn |= what == DRAWS
        if not self.asleep:
            self._hazards.append(what)

    # --- how it goes about it

    def _attribute(self, name: str) -> fx.Proxy:
        if name not in self._attributes:
            self._attributes[name] = self.create_proxy("get_attr", name, (), {})
        return self._attributes[name]

    def _opaque_from_the_start(self, module: nn.Module) -> str | None:
        if isinstance(module, _ALWAYS_OPAQUE) or type(module).forward is _BATCH_NORM:
            return f"{type(module).__name__} is run as it is"
        if getattr(module, "runs_opaque", False):
            return "it is variational itself"
        if isinstance(module, torch.jit.ScriptModule):
            return "it is TorchScript"
        if has_hooks(module):
            return "it has hooks"
        if any(isinstance(value, _GENERATORS) for value in vars(module).values()):
            return "it keeps a random generator"
        if nn.modules.module._has_any_global_hook():
            return "hooks are registered for all modules"
        return None

    def _call_opaque(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, why: str) -> Any:
        path = self.path_of_module(module)
        is_root = module is self.root.module
        options: dict[str, Any] = {}
        if not is_root and self._reaches_further(module):  # its weights are then all of the network's
            weights = {name: self._attribute(f"module.{name}") for name in self.chosen}
            options["holder"] = self.create_node("get_attr", "module", (), {})
        else:
            weights = {
                local: self._attribute(f"module.{name}")
                for local, parameter in module.named_parameters()
                if (name := self._chosen_name(parameter)) is not None
            }
        if is_root or weights:
            target = self.proxy(self.create_node("get_attr", path, (), {}))
            arguments = self.create_arg((target, weights, args, kwargs))
            node = super().create_node("call_function", run_with, arguments, options)
        else:
            node = super().create_node("call_module", path, self.create_arg(args), self.create_arg(kwargs))
        self._created.append(node)
        self.opaque[path.removeprefix("module").removeprefix(".")] = why
        if is_root:  # what it returns is what the program returns, whatever that is
            return self.proxy(node)
        if type(module).forward is _BATCH_NORM and isinstance(args[0] if args else None, fx.Proxy):
            like = _value(args[0])  # hundreds of times faster than torch on the meta device
            value: Any = self._awake_from(lambda: torch.empty_like(like))
        else:
            value = self._awake_from(lambda: forward(*self._values(args), **self._values(kwargs)))
        node.meta["value"] = value
        return self._structured(node, value)

    def _reaches_further(self, module: nn.Module) -> bool:
        """Whether a module holds, in a list or a helper object, variational parameters that aren't within it."""
        return any(self._chosen_name(parameter) is not None for parameter in foreign_parameters(module))

    def _chosen_name(self, parameter: Tensor) -> str | None:
        """The name of a variational parameter within the network; None of any other."""
        name = self._names.get(id(parameter), "").removeprefix("module.")
        return name if name in self.chosen else None

    def _structured(self, node: fx.Node, value: Any) -> Any:
        """The value of an opaque module as the network would see it: containers and None are real."""
        if isinstance(value, Tensor):
            return self.proxy(node)
        leaves, spec = pytree.tree_flatten(value)
        _check_output(value, tensors_too=True)
        self.needs_shapes = True
        parts = self.create_proxy("call_function", pytree.tree_leaves, (self.proxy(node),), {})
        return pytree.tree_unflatten(
            [parts[i] if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(leaves)], spec
        )

    def _roll_back(self, mark: int) -> None:
        while len(self._created) > mark:
            self.graph.erase_node(self._created.pop())
        kept = set(self._created)
        self._attributes = {name: proxy for name, proxy in self._attributes.items() if proxy.node in kept}

    # --- values without numbers

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "placeholder":
            return self.values[sum(node.op == "placeholder" for node in self._created) - 1]
        if kind == "get_attr":
            if not target.startswith("module"):  # something fx has put aside, which the live network does not have
                raise TraceError("it uses an object that no graph can hold, such as a generator")
            value: Any = self.root
            for atom in target.split("."):
                value = getattr(value, atom) if not isinstance(value, nn.Module) else _attribute_of(value, atom)
            return value
        args, kwargs = self._values(args), self._values(kwargs)
        if kind == "call_method":
            return self._awake_from(lambda: getattr(args[0], target)(*args[1:], **kwargs))
        return self._awake_from(lambda: target(*args, **kwargs))

    def _values(self, tree: Any) -> Any:
        return fx.node.map_aggregate(tree, _value)

    def _awake_from(self, run: Callable[[], Any]) -> Any:
        asleep, self.asleep = self.asleep, True
        generator = torch.get_rng_state()  # what names its device draws numbers even here
        try:
            with torch.device("meta"), torch.no_grad():
                return run()
        finally:
            if not torch.equal(torch.get_rng_state(), generator):
                torch.set_rng_state(generator)
            self.asleep = asleep


def _value(item: Any) -> Any:
    if isinstance(item, fx.Proxy):
        item = item.node
    return item.meta["value"] if isinstance(item, fx.Node) else item


def _attribute_of(module: nn.Module, name: str) -> Any:
    """`getattr` past the tracer's patch."""
    for table in (module._parameters, module._buffers, module._modules):
        if name in table:
            return table[name]
    return vars(module)[name]


def _check_output(output: Any, tensors_too: bool = False) -> None:
    allowed = (*CONSTANTS, Tensor) if tensors_too else CONSTANTS
    for leaf in pytree.tree_leaves(output):
        if not isinstance(leaf, fx.Proxy) and not isinstance(leaf, allowed):
            raise TraceError(f"it returns a {type(leaf).__name__}")


def _ambience() -> tuple[Any, ...]:
    """Settings that a graph doesn't record; where one changes, the graph would be wrong."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Within, gradients are on, and parametrizations not cached, for what is cached would be a traced value."""
    cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        with torch.enable_grad():
            yield
    finally:
        parametrize._cache_enabled = cached


def _numpys_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return name, np.asarray(keys).tobytes(), *rest


class _Generators:
    """The global generators of Python and numpy, put back after a trace in which the network used them.

    Not otherwise: another thread may have drawn from them meanwhile.
    """

    def __init__(self) -> None:
        self._states = random.getstate(), np.random.get_state()

    def restore(self) -> None:
        python, numpy = self._states
        random.setstate(python)
        np.random.set_state(numpy)


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
