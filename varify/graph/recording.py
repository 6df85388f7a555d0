"""Record one real call as a torch.fx graph: the torch functions that the user's own code calls, in order.

Tensors are recognized by identity. A branch or a length that depends on data is recorded as it was in this call, so a
record is valid for one set of shapes and decisions. Plans are made from it; what runs in training is the user's code.
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

# Methods by which code reads a tensor's value and may branch on it: the record is of calls that branch alike.
_DECIDING = frozenset({"__bool__", "__int__", "__float__", "__index__", "__contains__", "item", "tolist", "numpy"})


class Shape(tuple[int, ...]):
    """The shape of a node's value, in `meta["shape"]`."""

    __slots__ = ()


def is_dense(tensor: Tensor) -> bool:
    """Whether it is an ordinary strided tensor, neither sparse nor nested."""
    return tensor.layout is torch.strided and not tensor.is_nested


class Recording(TorchFunctionMode):
    """A context that records the torch functions called in it.

    Args:
        inputs: the tensors of the call, by the name of their placeholder.
        state: parameters and buffers of the network: by id, the tensor and the name of its `get_attr` node.
        chosen: names of the variational parameters. A torch function that takes one of them, has no rule and is written
            in Python is recorded by the functions that it calls.

    Attributes:
        graph: the record so far.
        decisions: where the call read the value of a tensor, in words.
        constants: tensors and objects from outside of the call and the network, by name.
    """

    def __init__(
        self, inputs: Mapping[str, Tensor], state: Mapping[int, tuple[Tensor, str]], chosen: Container[str]
    ) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.decisions: list[str] = []
        self.constants: dict[str, Any] = {}
        self._state, self._chosen = state, chosen
        self._known: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}
        self._attributes: dict[str, fx.Node] = {}
        self._ambience = self._first_ambience = _ambience()
        self._gradients, self._level = torch.is_grad_enabled(), transforms()
        for name, tensor in inputs.items():
            self._learn(tensor, self.graph.placeholder(name))

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if transforms() != self._level:
            self._note_transformed(args, kwargs)
            return func(*args, **kwargs)
        nodes = self._node(tuple(args)), self._node(dict(kwargs))
        if _has_chosen(nodes) and not has_rule(func):
            inner = inside(func)
            if inner is not None:
                with self:  # a mode is off while it handles a call, and must see those within
                    return inner(*args, **kwargs)
        # If an operation returns its argument itself, it has written into it (a new version) or done nothing (such as
        # `.contiguous()` of a contiguous tensor), which is not recorded.
        first = args[0] if args and isinstance(args[0], Tensor) else None
        version = None if first is None or first.is_inference() else first._version
        result = func(*args, **kwargs)
        if result is not first or first is None or version is None or first._version != version:
            self._note(func, nodes, result)
        return result

    # --- nodes of values

    def _learn(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta["dense"] = is_dense(tensor)
        node.meta["shape"] = Shape(() if tensor.is_nested else tensor.shape)  # a strided nested tensor has no shape
        node.meta["dtype"] = tensor.dtype
        self._known[id(tensor)] = weakref.ref(tensor), node

    def _known_node(self, tensor: Tensor) -> fx.Node | None:
        ref, node = self._known.get(id(tensor), (None, None))  # an id may be that of a tensor that is gone
        return node if ref is not None and ref() is tensor else None

    def _node(self, value: object) -> Any:
        """The argument with nodes in the place of tensors."""
        if isinstance(value, tuple):
            items = [self._node(item) for item in value]
            return type(value)._make(items) if hasattr(value, "_make") else tuple(items)
        if isinstance(value, list):
            return [self._node(item) for item in value]
        if isinstance(value, dict):
            return {key: self._node(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(self._node(bound) for bound in (value.start, value.stop, value.step)))
        if not isinstance(value, Tensor):
            return value if isinstance(value, _LITERALS) else self._constant(value)
        node = self._known_node(value)
        if node is None:
            tensor, name = self._state.get(id(value), (None, ""))
            node = self._get_attr(name) if tensor is value else self._constant(value)
            self._learn(value, node)
        return node

    def _get_attr(self, name: str) -> fx.Node:
        if name not in self._attributes:
            self._attributes[name] = self.graph.create_node("get_attr", name, name=f"p_{name.replace('.', '_')}")
            self._attributes[name].meta["chosen"] = name in self._chosen
        return self._attributes[name]

    def _constant(self, value: object) -> fx.Node:
        name = f"_constant{len(self.constants)}"
        self.constants[name] = value
        return self.graph.create_node("get_attr", name)

    # --- nodes of calls

    def _note(self, func: Callable[..., Any], nodes: tuple[Any, Any], result: object) -> None:
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
            for i, item in enumerate(result):
                if isinstance(item, Tensor):
                    part = self.graph.call_function(operator.getitem, (node, i))
                    part.meta["chosen"] = node.meta.get("chosen", False)
                    self._learn(item, part)

    def _note_transformed(self, args: object, kwargs: object) -> None:
        """Record that a transform uses a weight, as by a closure. Its own tensors mean nothing outside of it."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        nodes = [self._node(t) for t in tensors if id(t) in self._state or self._known_node(t) is not None]
        if any(node.meta.get("chosen") for node in nodes):
            self.graph.call_function(transform_of_torch_func, tuple(nodes))

    def _create(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
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

    def finish(self, output: object) -> None:
        """End the graph: it returns the tensors of the output, in order."""
        leaves = [self._node(leaf) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if self._ambience != self._first_ambience:
            self.graph.call_function(set_ambience, self._first_ambience)
        self.graph.output(tuple(leaves))
        for node in reversed(self.graph.nodes):  # the items of outputs that nothing uses
            if node.target is operator.getitem and not node.users and isinstance(node.args[0], fx.Node):
                self.graph.erase_node(node)


_LITERALS = (
    *(type(None), type(...), bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format),
    *(torch.layout, fx.Node),
)


def _has_chosen(nodes: tuple[Any, Any]) -> bool:
    args, kwargs = nodes
    return any(isinstance(arg, fx.Node) and arg.meta.get("chosen", False) for arg in (*args, *kwargs.values()))


def _has_node(tree: object) -> bool:
    return any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(tree))


def _ambience() -> tuple[Any, ...]:
    """Whether gradients are on, and the state of autocast.

    A graph has no `with` blocks, so changes of this state are recorded as operations, `set_ambience`.
    """
    return (
        torch.is_grad_enabled(),
        *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")),
    )


def set_ambience(gradients: bool, *autocast: tuple[bool, torch.dtype]) -> None:
    """Turn gradients and autocast on or off, as `with` blocks in the network's code did here."""
    torch.set_grad_enabled(gradients)
    for kind, (enabled, dtype) in zip(("cpu", "cuda"), autocast, strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


def transforms() -> int | None:
    """The number of torch.func transforms (vmap, grad, ...) around this; None if there is none."""
    level: int | None = torch._C._functorch.maybe_current_level()
    return level


def transform_of_torch_func(*tensors: Tensor) -> None:
    """A node in the place of whatever a transform within forward does with these tensors."""


@functools.cache
def inside(function: object) -> Callable[..., Any] | None:
    """A copy of a torch function written in Python that dispatches only the functions it calls; None for any other.

    Such a function begins with `if has_torch_function(...)`, by which a mode or a tensor subclass gets the call as a
    whole. In the copy that is False, so the functions that it calls are seen instead.
    """
    if not isinstance(function, types.FunctionType) or not function.__module__.startswith("torch."):
        return None
    names = function.__code__.co_names
    if "has_torch_function" not in names and not any(name.startswith("has_torch_function") for name in names):
        return None
    answers = {name: _false for name in function.__globals__ if name.startswith("has_torch_function")}
    copy = types.FunctionType(
        function.__code__, {**function.__globals__, **answers}, function.__name__, None, function.__closure__
    )
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return copy


def _false(*_: object) -> bool:
    return False


def placeholders(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The distinct tensors of a call, by the names of their placeholders."""
    leaves: Iterable[Any] = pytree.tree_leaves((args, dict(kwargs)))
    distinct = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
    return {f"x{i}": tensor for i, tensor in enumerate(distinct.values())}
