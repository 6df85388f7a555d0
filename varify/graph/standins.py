"""Moments in the place of a weight while the user's own code runs.

A stand-in is a tensor without storage that knows its shape. The operation that the plan foresaw calls the estimator's
rule; views of the stand-in are stand-ins; questions about shape, type and device are answered. Where anything else asks
for the weight's numbers the weight is drawn, once a call.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from varify.estimators.rules import Rule, canonical, find_rule, has_rule
from varify.graph.planning import GRADIENTS_ARE_OFF, Decision, is_once
from varify.graph.recording import inside, transforms
from varify.graph.reruns import kept_by_no_checkpoint, noise_of_use, random_state
from varify.graph.tensor_views import PROPERTIES, Path, step, view_moments, view_tensor
from varify.network.view import Discarded
from varify.weights.moments import Examples, Moments
from varify.weights.posterior import GaussianPosterior

# What a tensor answers without its numbers.
_ANSWERED = frozenset(
    {"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "itemsize", "nbytes", "names", "grad"}
    | {"is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_sparse", "is_quantized", "is_nested", "is_mkldnn"}
    | {"size", "dim", "numel", "nelement", "ndimension", "stride", "is_floating_point", "is_complex", "is_contiguous"}
    | {"element_size", "get_device", "__len__", "is_sparse_csr", "is_ipu", "is_vulkan", "is_mtia", "is_inference"}
)


class Unforeseen(Discarded):
    """A weight whose noise is drawn already is asked for in another way: the call is to be made again."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.name, self.why = name, why


class Cell:
    """One estimated parameter in one call.

    Attributes:
        name: of the parameter.
        estimator: its own, "local" or "flipout".
        moments: made at the start of the call and not in a checkpoint, which would not find them again.
        over: whether the call is: what still runs is run again for its gradients.
        late: why the weight was drawn after all; empty if it wasn't.
    """

    def __init__(self, name: str, q: GaussianPosterior, decision: Decision, count: int | None) -> None:
        self.name = name
        self._q, self._count = q, count
        self.estimator, self._keeps, self._automatic = decision.estimator, decision.keeps, decision.automatic
        # as of a draw: where gradients are off, that of the parameter, which a forward may ask for
        self.requires_grad = q.mu.requires_grad or (q.rho.requires_grad and torch.is_grad_enabled())
        self._unseen, self.late = decision.unseen, ""
        self._foreseen = decision.foreseen
        self._met: dict[Path, int] = {}
        self._states: dict[Path, tuple[Tensor, Tensor]] = {}
        self._draw: Tensor | None = None
        self._gradients, self._level = torch.is_grad_enabled(), transforms()
        self.over = False
        self.unforeseen: Unforeseen | None = None
        self.moments = q.moments(keeping=(count or 1) if self._keeps else None)

    def stand_in(self) -> Any:
        """What is put in the place of the parameter."""
        return _StandIn(self, self.moments, ())

    # --- what the network asks of it

    def serve(self, path: Path, operation: Any, rule: Rule, arguments: dict[str, Any]) -> tuple[Rule, Examples] | None:
        """The rule and the examples for this use, if it is a foreseen one; it counts as met then."""
        foreseen = self._foreseen.get(path, [])
        if self.over:  # uses run again in any order, and those of one operation are alike
            foreseen = [use for use in foreseen if use[0] == operation][:1]
        place = 0 if self.over else self._met.get(path, 0)
        if place >= len(foreseen):
            return None
        expected, examples = foreseen[place]
        if expected != operation:
            return None
        if examples.dim is not None:
            if self._count is None:
                return None
            examples = examples._replace(number=self._count)
        if not _fits(examples, arguments) or rule.refuses(arguments):
            return None
        return self._chosen(rule, operation, arguments, examples), examples

    def meet(self, path: Path) -> None:
        """Count a use."""
        self._met[path] = self._met.get(path, 0) + 1

    def noise_of(self, path: Path) -> Any:
        """Within, random numbers are those of this use, also when it runs again."""
        return noise_of_use(self._states, path, self.over, self.moments.mu.device)

    def _chosen(self, rule: Rule, operation: Any, arguments: dict[str, Any], examples: Examples) -> Rule:
        """Of "auto", local where each example uses an element once at most, which depends on the shapes."""
        if not self._automatic or self._keeps:
            return rule
        local, flipout = find_rule("local", operation), find_rule("flipout", operation)
        once = local is not None and is_once(local, arguments, examples)
        return local if once and local else flipout or rule

    def check(self) -> None:
        """Raise `Unforeseen` where neither a draw nor a rule would do, since gradients would not come back."""
        if self.over:
            return
        if torch.is_grad_enabled() < self._gradients:
            raise self.unforeseen_as(GRADIENTS_ARE_OFF)
        if transforms() != self._level:
            raise self.unforeseen_as("it is used in a transform of torch.func")

    def unforeseen_as(self, why: str) -> Unforeseen:
        """The error; it is known here too, for those who make another of it, or none."""
        self.unforeseen = Unforeseen(self.name, why)
        return self.unforeseen

    def drawn(self, why: str) -> Tensor:
        """The call's one draw.

        Raises:
            Unforeseen: an operation has drawn its own noise for this weight before, or it is the first to use it.
        """
        if self._draw is None:
            if (any(self._met.values()) or self._unseen) and not self.over:
                raise self.unforeseen_as(why)
            self.late = why
            rho = self._q.rho
            # of a generator of its own, else it would shift the random numbers of what follows
            generator = torch.Generator(rho.device)
            generator.manual_seed(zlib.crc32(self.name.encode() + random_state(rho.device).numpy().tobytes()))
            eps = torch.randn(rho.shape, generator=generator, device=rho.device, dtype=rho.dtype)
            with kept_by_no_checkpoint():
                self._draw = self._q.at(eps).to(self._q.mu.dtype)
        return self._draw


def _fits(examples: Examples, arguments: dict[str, Any]) -> bool:
    if examples.dim is None:
        return True
    shapes = [v.shape for v in arguments.values() if isinstance(v, Tensor) and not isinstance(v, _StandIn)]
    return any(len(s) > examples.dim and s[examples.dim] and s[examples.dim] % examples.number == 0 for s in shapes)


class _StandIn(Tensor):
    """See the module's first lines."""

    cell: Cell
    moments: Moments
    path: Path
    _again: Callable[[Tensor], Any]

    @staticmethod
    def __new__(
        cls, cell: Cell, moments: Moments, path: Path, again: Callable[[Tensor], Any] = lambda draw: draw
    ) -> "_StandIn":
        mu = moments.mu
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, mu.shape, strides=mu.stride(), dtype=mu.dtype, device=mu.device, requires_grad=cell.requires_grad
        )
        made.cell, made.moments, made.path, made._again = cell, moments, path, again
        return made  # type: ignore[no-any-return]

    def __init__(self, *_: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__self__.__name__ if func.__name__ in ("__get__", "__set__") else func.__name__
        if name in _ANSWERED and func.__name__ != "__set__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, _StandIn):
                leaf.cell.check()
        first = args[0] if args else None
        if isinstance(first, _StandIn) and (name not in PROPERTIES or func.__name__ == "__get__"):
            taken = step(name, args[1:], kwargs)
            if taken is not None:
                return first._viewed(taken, args[1:], kwargs)
        if has_rule(func):
            served = _served(func, args, kwargs)
            if served is not None:
                return served
        else:
            inner = inside(func)
            if inner is not None:
                return inner(*args, **kwargs)
        why = f"it meets {name}"
        args, kwargs = pytree.tree_map_only(_StandIn, lambda one: one.drawn(why), (tuple(args), kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # past torch functions: TorchScript, or a transform over the weight. Here gradients would be lost.
        (one, *_) = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, _StandIn)]
        raise one.cell.unforeseen_as(f"it meets {func} where torch functions are not seen")

    def _viewed(self, taken: tuple[str, str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        path, name = (*self.path, taken), taken[0]

        def again(draw: Tensor) -> Any:
            return view_tensor(self._again(draw), name, *args, **kwargs)

        found = view_moments(self.moments, name, *args, **kwargs)
        if isinstance(found, Moments) and found.mu is self.moments.mu:
            return self  # nothing was done, as by `.contiguous()` of what is so
        if isinstance(found, tuple):
            return tuple(
                _StandIn(self.cell, m, (*path, ("getitem", f"({i},)")), lambda draw, i=i: again(draw)[i])
                for i, m in enumerate(found)
            )
        return _StandIn(self.cell, found, path, again)

    def drawn(self, why: str) -> Tensor:
        """The draw, seen as this is."""
        tensor: Tensor = self._again(self.cell.drawn(why))
        return tensor


def _served(func: Any, args: Any, kwargs: Any) -> Any:
    """The output of the rule for an operation that the plan foresaw, or None."""
    operation = canonical(func)
    for one in [a for a in (*args, *kwargs.values()) if isinstance(a, _StandIn)]:
        rule = find_rule(one.cell.estimator, operation)
        if rule is None:
            continue
        try:
            arguments = rule.arguments(args, kwargs)
        except TypeError:
            continue
        if not any(arguments.get(argument) is one for argument in rule.of):
            continue
        found = one.cell.serve(one.path, operation, rule, arguments)
        if found is None:
            continue
        chosen, examples = found
        along = [arguments.get(argument) for argument in chosen.along]
        with_it = [b for b in along if isinstance(b, _StandIn) and b.cell.serve(b.path, operation, chosen, arguments)]
        given = {id(b): b.moments for b in (one, *with_it)}

        def of(value: Any, given: dict[int, Moments] = given, name: str = func.__name__) -> Any:
            if not isinstance(value, _StandIn):
                return value
            return given[id(value)] if id(value) in given else value.drawn(f"it meets {name} as another argument")

        ready = [of(a) for a in args], {key: of(a) for key, a in kwargs.items()}
        for b in (one, *with_it):
            b.cell.meet(b.path)
        with one.cell.noise_of(one.path):
            return chosen.function(examples, *ready[0], **ready[1])
    return None
