"""One real call as a torch.fx graph: what torch was asked to do while the user's own code ran.

Tensors are known by identity. What data decided (a branch, a length) is in the record as it was decided, so a record
holds for one set of shapes and decisions; it is to plan by and to look at, and the user's code is what runs.
"""

import functools
import operator
import types
import weakref
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils import _pytree as pytree

from varify.estimators.rules import has_rule
from varify.graph.tensor_views import step

# What a network asks a value for to decide something: the record holds for calls that decide alike.
_DECIDING = frozenset({"__bool__", "__int__", "__float__", "__index__", "__contains__", "item", "tolist", "numpy"})
# Properties that are values to compute with; the others describe a tensor.
_COMPUTED = frozenset({"T", "mT", "H", "mH", "data", "real", "imag", "grad"})


class Shape(tuple[int, ...]):
    """What is known of a node's value without it: `meta["shape"]`."""

    __slots__ = ()


def is_dense(tensor: Tensor) -> bool:
    """Whether it is neither sparse nor nested nor of any other kind that few operations take."""
    return tensor.layout is torch.strided and not tensor.is_nested


class Recording(TorchFunctionMode):
    """Records the calls within it.

    Args:
        inputs: the call's tensors by the name of their placeholder.
        held: what the network holds: by identity, a tensor and the name that its `get_attr` node is to have.
        chosen: names of the variational parameters: functions of torch's that take one of them, and are written in
            Python and have no rule, are gone into.

    Attributes:
        graph: so far.
        decisions: what data decided, in words.
        constants: tensors that nothing recorded made, by name.
    """

    def __init__(
        self, inputs: Mapping[str, Tensor], held: Mapping[int, tuple[Tensor, str]], chosen: Container[str]
    ) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.decisions: list[str] = []
        self.constants: dict[str, Any] = {}
        self._held, self._chosen = held, chosen
        self._known: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}
        self._attributes: dict[str, fx.Node] = {}
        self._ambience = self._first_ambience = _ambience()
        self._gradients, self._level = torch.is_grad_enabled(), transforms()
        for name, tensor in inputs.items():
            self._learn(tensor, self.graph.placeholder(name))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if transforms() != self._level:
            self._note_transformed(args, kwargs)
            return func(*args, **kwargs)
        nodes = self._node(tuple(args)), self._node(dict(kwargs))
        if _has_chosen(nodes) and not has_rule(func):
            inner = inside(func)
            if inner is not None:
                with self:
                    return inner(*args, **kwargs)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        version = None if first is None or first.is_inference() else first._version
        result = func(*args, **kwargs)
        if result is not first or first is None or version is None or first._version != version:
            self._note(func, nodes, result)  # else nothing was done, as by `.contiguous()` of what is so
        return result

    # --- from values to nodes

    def _learn(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta["dense"] = is_dense(tensor)
        node.meta["shape"] = Shape(() if tensor.is_nested else tensor.shape)  # strided nested ones have none
        node.meta["dtype"] = tensor.dtype
        self._known[id(tensor)] = weakref.ref(tensor), node

    def _known_node(self, tensor: Tensor) -> fx.Node | None:
        ref, node = self._known.get(id(tensor), (None, None))
        return node if ref is not None and ref() is tensor else None

    def _node(self, value: Any) -> Any:
        """What stands for an argument in the graph."""
        if isinstance(value, tuple):
            made = [self._node(one) for one in value]
            return type(value)._make(made) if hasattr(value, "_make") else tuple(made)
        if isinstance(value, list):
            return [self._node(one) for one in value]
        if isinstance(value, dict):
            return {key: self._node(one) for key, one in value.items()}
        if isinstance(value, slice):
            return slice(*(self._node(one) for one in (value.start, value.stop, value.step)))
        if not isinstance(value, Tensor):
            return value if isinstance(value, _WRITABLE) else self._constant(value)
        node = self._known_node(value)
        if node is None:
            tensor, name = self._held.get(id(value), (None, ""))
            node = self._get_attr(name) if tensor is value else self._constant(value)
            self._learn(value, node)
        return node

    def _get_attr(self, name: str) -> fx.Node:
        if name not in self._attributes:
            self._attributes[name] = self.graph.create_node("get_attr", name, name=f"p_{name.replace('.', '_')}")
            self._attributes[name].meta["chosen"] = name in self._chosen
        return self._attributes[name]

    def _constant(self, value: Any) -> fx.Node:
        name = f"_constant{len(self.constants)}"
        self.constants[name] = value
        return self.graph.create_node("get_attr", name)

    # --- what is recorded

    def _note(self, func: Any, nodes: Any, result: Any) -> None:
        args, kwargs = nodes
        name = getattr(func, "__name__", "")
        if name in _DECIDING and args and isinstance(args[0], fx.Node):
            self.decisions.append(f"{name.strip('_')}({args[0]}) = {result!r}"[:200])
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        writes = name in ("__setitem__", "__set__", "_set_item") or name.startswith("_foreach")
        if not tensors and not (writes and _has_node(args)):
            return
        self._note_ambience()
        node = self._create(func, name, args, kwargs)
        if args and isinstance(args[0], fx.Node) and args[0].meta.get("chosen"):
            taken = (str(node.args[1]), (), {}) if node.target is getattr else (name, args[1:], kwargs)
            node.meta["chosen"] = step(*taken) is not None
        node.meta["gradients"] = torch.is_grad_enabled() or not self._gradients
        if isinstance(result, Tensor):
            self._learn(result, node)
        elif isinstance(result, (tuple, list)):
            for i, one in enumerate(result):
                if isinstance(one, Tensor):
                    part = self.graph.call_function(operator.getitem, (node, i))
                    part.meta["chosen"] = node.meta.get("chosen", False)
                    self._learn(one, part)

    def _note_transformed(self, args: Any, kwargs: Any) -> None:
        """Tensors within a transform are of no use outside; but weights that came in by a closure are used there."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        nodes = [self._node(t) for t in tensors if id(t) in self._held or self._known_node(t) is not None]
        if any(node.meta.get("chosen") for node in nodes):
            self.graph.call_function(transform_of_torch_func, tuple(nodes))

    def _create(self, func: Any, name: str, args: Any, kwargs: Any) -> fx.Node:
        if name == "__get__":
            return self.graph.call_function(getattr, (args[0], func.__self__.__name__))
        if name == "__set__":
            return self.graph.call_function(setattr, (args[0], func.__self__.__name__, args[1]))
        if name in ("__getitem__", "__setitem__"):
            return self.graph.call_function(getattr(operator, name.strip("_")), args)
        if is_tensor_method_or_property(func) or getattr(Tensor, name, None) is func:  # those written in Python too
            return self.graph.call_method(name, args, kwargs)
        return self.graph.call_function(func, args, kwargs)

    def _note_ambience(self) -> None:
        now = _ambience()
        if now != self._ambience:
            self.graph.call_function(set_ambience, now)
            self._ambience = now

    def finish(self, output: Any) -> None:
        """End the graph: it returns the tensors of the output, in order."""
        leaves = [self._node(leaf) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if self._ambience != self._first_ambience:
            self.graph.call_function(set_ambience, self._first_ambience)
        self.graph.output(tuple(leaves))
        for node in reversed(self.graph.nodes):
            if node.target is operator.getitem and not node.users and isinstance(node.args[0], fx.Node):
                self.graph.erase_node(node)


_WRITABLE = (
    *(type(None), type(...), bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format),
    *(torch.layout, fx.Node),
)


def _has_chosen(nodes: Any) -> bool:
    args, kwargs = nodes
    return any(isinstance(one, fx.Node) and one.meta.get("chosen", False) for one in (*args, *kwargs.values()))


def _has_node(tree: Any) -> bool:
    return any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(tree))


def _ambience() -> tuple[Any, ...]:
    """Whether gradients are on, and what autocast does: a graph has no blocks, so changes are operations in it."""
    return (
        torch.is_grad_enabled(),
        *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")),
    )


def set_ambience(gradients: bool, *autocast: tuple[bool, torch.dtype]) -> None:
    """Turn gradients and autocast on or off, as the blocks of the network's code did at this place."""
    torch.set_grad_enabled(gradients)
    for kind, (enabled, dtype) in zip(("cpu", "cuda"), autocast, strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


def transforms() -> int | None:
    """How many transforms of torch.func run around this, such as vmap or grad; None if none does."""
    level: int | None = torch._C._functorch.maybe_current_level()
    return level


def transform_of_torch_func(*tensors: Tensor) -> None:
    """Stands in a record for what a transform within forward does with these."""


@functools.cache
def inside(function: Any) -> Callable[..., Any] | None:
    """A function of torch's that is written in Python, such that its own calls are seen; None for any other.

    Torch asks at its start whether somebody wants to be told of the call as a whole; in this copy the answer is no.
    """
    if not isinstance(function, types.FunctionType) or not function.__module__.startswith("torch."):
        return None
    names = function.__code__.co_names
    if "has_torch_function" not in names and not any(name.startswith("has_torch_function") for name in names):
        return None
    answers = {name: _no for name in function.__globals__ if name.startswith("has_torch_function")}
    copy = types.FunctionType(
        function.__code__, {**function.__globals__, **answers}, function.__name__, None, function.__closure__
    )
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return copy


def _no(*_: Any) -> bool:
    return False


def placeholders(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The distinct tensors of a call, under names to be placeholders."""
    leaves: Iterable[Any] = pytree.tree_leaves((args, dict(kwargs)))
    distinct = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
    return {f"x{i}": tensor for i, tensor in enumerate(distinct.values())}
