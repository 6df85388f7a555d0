"""Tensors without storage that stand for Gaussians while the user's own code runs: an operation on them is its rule."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from varify.errors import PropagationError
from varify.graph.recording import inside
from varify.propagation.rules import Uncertain, canonical, find_rule

# Queries that need no numbers.
_ANSWERED = frozenset(
    {f"get {name}" for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "itemsize")}
    | {f"get {name}" for name in ("is_cuda", "is_cpu", "is_meta", "is_mps", "is_sparse", "is_quantized", "is_nested")}
    | {"size", "dim", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "is_contiguous"}
    | {"element_size", "get_device", "is_inference", "is_same_size"}
)
_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = str(Path(__file__).parents[1]) + os.sep


class UncertainTensor(Tensor):
    """What the user's code meets in the place of a tensor that is random.

    Attributes:
        gaussian: its mean and variance.
        shares: whether another such tensor may have the same memory, as a view has.
    """

    gaussian: Uncertain
    shares: bool

    @staticmethod
    def __new__(cls, gaussian: Uncertain) -> "UncertainTensor":  # noqa: D102
        mean, var = gaussian.mean, gaussian.var
        new: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, mean.shape, dtype=mean.dtype, device=mean.device, requires_grad=mean.requires_grad or var.requires_grad
        )
        new.gaussian, new.shares = gaussian, False
        return new  # type: ignore[no-any-return]

    def __init__(self, *_: object) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, canonical(func)
        if name in _ANSWERED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name == "__len__":
            return args[0].shape[0]
        rule = find_rule(func)
        if rule is not None:
            return _wrapped(_called(rule, func, args, kwargs), args)
        inner = inside(func)
        if inner is not None:
            return inner(*args, **kwargs)
        if name == "__setitem__" or (isinstance(name, str) and name.endswith("_") and not name.endswith("__")):
            return _in_place(func, str(name), args, kwargs)
        raise _refused(func, "it has no rule")

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> Any:  # type: ignore[override]
        raise _refused(func, "it runs where torch functions are not seen, as in TorchScript")

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"UncertainTensor(shape={tuple(self.gaussian.mean.shape)})"


def gaussians_of(value: object) -> Any:
    """The value with Gaussians in the place of the tensors that stand for them; lists and tuples alike."""
    if isinstance(value, UncertainTensor):
        return value.gaussian
    if isinstance(value, (list, tuple)) and any(isinstance(v, UncertainTensor) for v in value):
        return [gaussians_of(v) for v in value]
    return value


def _called(rule: Callable[..., Any], func: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    positional, named = [gaussians_of(a) for a in args], {key: gaussians_of(a) for key, a in kwargs.items()}
    if "out" in named:
        raise _refused(func, "it writes into out=")
    try:
        return rule(func, *positional, **named)
    except PropagationError as error:
        raise _refused(func, str(error)) from None
    except TypeError as error:  # arguments that the rule does not know, or do not fit the operation
        raise _refused(func, f"its rule does not take these arguments ({error})") from error


def _wrapped(result: object, args: tuple[Any, ...]) -> Any:
    if isinstance(result, (list, tuple)):
        return type(result)([_wrapped(item, args) for item in result])
    if not isinstance(result, Uncertain):
        return result
    first = args[0] if args else None
    if not isinstance(first, UncertainTensor):
        return UncertainTensor(result)
    if result is first.gaussian:  # it did nothing, such as dropout in eval mode
        return first
    new = UncertainTensor(result)
    if result.mean.untyped_storage().data_ptr() == first.gaussian.mean.untyped_storage().data_ptr():
        first.shares = new.shares = True
    return new


def _in_place(func: object, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An operation that writes its result into its first argument."""
    target = args[0]
    if not isinstance(target, UncertainTensor):
        raise _refused(func, "it would write what is uncertain into a tensor that is not: make a new tensor instead")
    if name == "__setitem__":
        value = gaussians_of(args[2])
        with torch.no_grad() if not torch.is_grad_enabled() else torch.enable_grad():
            target.gaussian.mean[args[1]] = value.mean if isinstance(value, Uncertain) else value
            target.gaussian.var[args[1]] = value.var if isinstance(value, Uncertain) else 0.0
        return None
    plain = getattr(Tensor, name[:-1], None) or getattr(torch, name[:-1], None)
    rule = find_rule(name[:-1])
    if rule is None or plain is None:
        raise _refused(func, "it has no rule")
    result = _called(rule, plain, args, kwargs)
    if target.shares:  # a view of it, or what it is a view of, must see the result too
        target.gaussian.mean.copy_(result.mean)
        target.gaussian.var.copy_(result.var)
    else:
        target.gaussian = result
    return target


# --- refusals


def _refused(func: object, why: str) -> PropagationError:
    name = canonical(func)
    name = name if isinstance(name, str) else getattr(name, "__name__", repr(name))
    return PropagationError(
        f"mean and variance can't be propagated through {name.removeprefix('get .')}{_place()}: {why}. "
        "vnet.predict draws weights instead, for any network; varify.propagation.rule adds a rule"
    )


def _place() -> str:
    """Where in the user's network the operation is: the module by its path, and the line of its code."""
    frame: FrameType | None = sys._getframe(1)
    module: nn.Module | None = None
    line = ""
    while frame is not None:
        code, owner = frame.f_code, frame.f_locals.get("self")
        if code is RUNS_NETWORK.__code__:
            network = frame.f_locals["network"]
            path = next((name for name, part in network.named_modules() if part is module), None)
            at = f" in {path or 'forward'} ({type(module).__name__})" if path is not None else ""
            return f"{at}{line}"
        if module is None and isinstance(owner, nn.Module):
            module = owner
        if not line and not code.co_filename.startswith((_TORCH, _HERE)):
            line = f", line {frame.f_lineno} of {code.co_filename}"
        frame = frame.f_back
    return line


def run_network(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call the network; refusals look for the frame of this function to name the module that they are in."""
    return network(*args, **kwargs)


RUNS_NETWORK = run_network
