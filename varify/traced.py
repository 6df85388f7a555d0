"""Values within a trace: proxies that answer no question wrongly, and a recorder of what no proxy takes part in."""

import operator
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import Tensor, fx
from torch.fx.proxy import Attribute, TraceError
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils import _pytree as pytree

# Attributes that are not the same at every call of a program.
_OF_THE_MOMENT = frozenset(
    {"requires_grad", "is_leaf", "grad", "grad_fn", "is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "_version"}
    | {"layout", "data_ptr", "item", "tolist", "numpy", "storage", "untyped_storage", "is_contiguous", "stride"}
)
# Where a question about a traced value's type is fx's own and not the network's.
_TRUSTED = ("torch.fx", "torch.utils._pytree", "torch.overrides", "varify.tracing", "varify.traced")


class Traced(fx.Proxy):
    """A proxy that answers no question wrongly: what it can't know it refuses, and the tracer rolls back."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]  # asked by isinstance() where the plain answer is no
        _refuse_outside_fx("its type was asked for")
        return type(self)

    def __repr__(self) -> str:
        _refuse_outside_fx("it was printed")
        return fx.Proxy.__repr__(self)

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        _refuse_outside_fx("it was printed")
        return format(fx.Proxy.__repr__(self), spec)

    def __hash__(self) -> int:
        _refuse_outside_fx("it was looked up in a set or dict")
        return object.__hash__(self)

    def __getattr__(self, name: str) -> Any:
        value = self.node.meta["value"]
        if name == "dtype" and isinstance(value, Tensor):
            return value.dtype  # the key of a program has the dtypes of the call's tensors, and autocast
        if name in _OF_THE_MOMENT:
            _refuse_outside_fx(f"its {name} was asked for")
        elif not hasattr(value, name):
            raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}")
        return TracedAttribute(self, name)


def _in_place(name: str) -> Callable[[fx.Proxy, Any], Any]:
    """`x += y` writes into x, and into what x is a view of; without this method Python would take `x = x + y`."""

    def method(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(Traced, f"__{_name}__", _in_place(_name))


class TracedAttribute(Traced, Attribute):
    """`x.shape`, `x.mean`, ...: an attribute, or the method about to be called."""

    def __init__(self, root: fx.Proxy, attr: str) -> None:
        Attribute.__init__(self, root, attr)

    def __getattr__(self, name: str) -> Any:
        return TracedAttribute(self, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method's call."""
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


class TracedParameter(Traced):
    """A parameter: its shape and dtype are those of every draw of it, so they are plain constants."""

    def __getattr__(self, name: str) -> Any:
        if name in {"shape", "ndim", "dtype", "size", "dim", "numel", "nelement", "is_floating_point"}:
            return getattr(self.node.meta["value"], name)
        return super().__getattr__(name)


def _refuse_outside_fx(what: str) -> None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == "torch.nn.parameter":  # a metaclass on the way
        frame = frame.f_back
    asker = str(frame.f_globals.get("__name__", "")) if frame else ""
    if not asker.startswith(_TRUSTED):
        raise TraceError(f"a value that depends on the input decides the program: {what} in {asker}")


class Recorder(TorchFunctionMode):
    """Records torch functions that no traced value is an argument of, else their results would be frozen in."""

    def __init__(self, tracer: Any) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.tracer.asleep or name == "__get__" or _holds_proxy((args, kwargs)):
            return func(*args, **kwargs)  # with a proxy in it, the proxy records it
        if is_tensor_method_or_property(func):
            return self.tracer.create_proxy("call_method", name, args, kwargs)
        return self.tracer.create_proxy("call_function", func, args, kwargs)


def _holds_proxy(tree: Any) -> bool:
    return any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(tree))
