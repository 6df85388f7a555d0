"""Stand-ins: tensors without storage that take the place of estimated parameters while the user's code runs.

An operation that the plan foresees calls the estimator's rule. Views of a stand-in are stand-ins; queries of shape,
dtype and device are answered. If any other operation needs the weight's numbers, the weight is drawn, once a call.
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
from varify.graph.reruns import hidden_from_checkpoints, noise_of_use, random_state
from varify.graph.tensor_views import PROPERTIES, Path, step, view_moments, view_tensor
from varify.network.view import Discarded
from varify.weights.moments import Examples, Moments
from varify.weights.posterior import GaussianPosterior

# Queries that need no numbers.
_ANSWERED = frozenset(
    {"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "itemsize", "nbytes", "names", "grad"}
    | {"is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_sparse", "is_quantized", "is_nested", "is_mkldnn"}
    | {"size", "dim", "numel", "nelement", "ndimension", "stride", "is_floating_point", "is_complex", "is_contiguous"}
    | {"element_size", "get_device", "__len__", "is_sparse_csr", "is_ipu", "is_vulkan", "is_mtia", "is_inference"}
)


class Unforeseen(Discarded):
    """A use that the plan does not foresee and no draw can serve any more: the call must be made again."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.name, self.why = name, why


class EstimatedParameter:
    """One parameter in one call that has a stand-in.

    Attributes:
        name: of the parameter.
        estimator: "local" or "flipout".
        moments: made at the start of the call, with the noise if several uses share it. Were that drawn at the first
            use, which may be in a checkpoint, the checkpoint would expect backward to draw it again.
        over: whether the call has returned; an operation that still runs is a checkpoint's, recomputed in backward.
        late: the reason if the weight was drawn after all; else empty.
        unforeseen: the reason why the call is to be made again; else empty. Not the error itself: its frames would live
            on, and torch before 2.13 keeps a checkpoint's hooks in place as long as the frame of one that failed lives.
    """

    def __init__(self, name: str, q: GaussianPosterior, decision: Decision, count: int | None) -> None:
        self.name = name
        self._q, self._count = q, count
        self.estimator, self._keeps, self._automatic = decision.estimator, decision.keeps, decision.automatic
        # that of a draw; with gradients off, that of the parameter, since forward may branch on it
        self.requires_grad = q.mu.requires_grad or (q.rho.requires_grad and torch.is_grad_enabled())
        self._unseen, self.late = decision.unseen, ""
        self._foreseen = decision.foreseen
        self._use_counts: dict[Path, int] = {}
        self._states: dict[Path, tuple[Tensor, Tensor]] = {}
        self._draw: Tensor | None = None
        self._gradients, self._level = torch.is_grad_enabled(), transforms()
        self.over = False
        self.unforeseen = ""
        self.moments = q.moments(keeping=(count or 1) if self._keeps else None)

    def stand_in(self) -> Any:
        """The stand-in for the parameter."""
        return _StandIn(self, self.moments, ())

    # --- uses

    def serve(
        self, path: Path, operation: object, rule: Rule, arguments: dict[str, Any]
    ) -> tuple[Rule, Examples] | None:
        """The rule and the examples for this use, or None if the plan does not foresee it.

        Args:
            path: the views from the parameter to the argument.
            operation: its key in the table of rules.
            rule: of the parameter's estimator.
            arguments: of the operation.
        """
        foreseen = self._foreseen.get(path, [])
        if self.over:  # recomputed in any order; the plan made sure that uses of one operation are alike
            foreseen = [use for use in foreseen if use[0] == operation][:1]
        index = 0 if self.over else self._use_counts.get(path, 0)
        if index >= len(foreseen):
            return None
        expected, examples = foreseen[index]
        if expected != operation:
            return None
        if examples.dim is not None:
            if self._count is None:
                return None
            examples = examples._replace(number=self._count)
        if not _fits(examples, arguments) or rule.refuses(arguments):
            return None
        return self._rule_for(rule, operation, arguments, examples), examples

    def count_use(self, path: Path) -> None:
        """Count a use at the end of `path`."""
        self._use_counts[path] = self._use_counts.get(path, 0) + 1

    def noise_of(self, path: Path) -> Any:
        """Context in which this use draws its noise, the same when it is recomputed; see `noise_of_use`."""
        return noise_of_use(self._states, path, self.over, self.moments.mu.device)

    def _rule_for(self, rule: Rule, operation: object, arguments: dict[str, Any], examples: Examples) -> Rule:
        """The rule; under "auto" that of local if each example uses an element at most once, else that of flipout.

        It is chosen in each call since it depends on the shapes: one position an example, or many.
        """
        if not self._automatic or self._keeps:
            return rule
        local, flipout = find_rule("local", operation), find_rule("flipout", operation)
        once = local is not None and is_once(local, arguments, examples)
        return local if once and local else flipout or rule

    def check(self) -> None:
        """Raise `Unforeseen` where gradients would not reach mu and rho, neither from a draw nor from a rule."""
        if self.over:
            return
        if torch.is_grad_enabled() < self._gradients:
            raise self.unforeseen_as(GRADIENTS_ARE_OFF)
        if transforms() != self._level:
            raise self.unforeseen_as("it is used in a transform of torch.func")

    def unforeseen_as(self, why: str) -> Unforeseen:
        """The error to raise; its reason is also stored, since the network may swallow it or raise another instead."""
        self.unforeseen = why
        return Unforeseen(self.name, why)

    def drawn(self, why: str) -> Tensor:
        """The draw of this call, made when it is first needed.

        Raises:
            Unforeseen: a rule has drawn its own noise for this weight already, or no call has used it before.
        """
        if self._draw is None:
            if (any(self._use_counts.values()) or self._unseen) and not self.over:
                raise self.unforeseen_as(why)
            self.late = why
            rho = self._q.rho
            # By a separate generator, or the random numbers of what follows (dropout) would shift. It is seeded by name
            # and random state: weights differ from each other, and the user's seed gives the same draw again.
            generator = torch.Generator(rho.device)
            generator.manual_seed(zlib.crc32(self.name.encode() + random_state(rho.device).numpy().tobytes()))
            eps = torch.randn(rho.shape, generator=generator, device=rho.device, dtype=rho.dtype)
            with hidden_from_checkpoints():
                self._draw = self._q.at(eps).to(self._q.mu.dtype)
        return self._draw


def _fits(examples: Examples, arguments: dict[str, Any]) -> bool:
    """Whether some argument has the dimension that counts the examples, in a size that they divide."""
    if examples.dim is None:
        return True
    shapes = [v.shape for v in arguments.values() if isinstance(v, Tensor) and not isinstance(v, _StandIn)]
    return any(len(s) > examples.dim and s[examples.dim] and s[examples.dim] % examples.number == 0 for s in shapes)


class _StandIn(Tensor):
    """A tensor without storage for a parameter or a view of it.

    `_view` makes the same view of the parameter's draw.
    """

    parameter: EstimatedParameter
    moments: Moments
    path: Path
    _view: Callable[[Tensor], Any]

    @staticmethod
    def __new__(
        cls,
        parameter: EstimatedParameter,
        moments: Moments,
        path: Path,
        view: Callable[[Tensor], Any] = lambda draw: draw,
    ) -> "_StandIn":
        mu = moments.mu
        stand_in: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, mu.shape, strides=mu.stride(), dtype=mu.dtype, device=mu.device, requires_grad=parameter.requires_grad
        )
        stand_in.parameter, stand_in.moments, stand_in.path, stand_in._view = parameter, moments, path, view
        return stand_in  # type: ignore[no-any-return]

    def __init__(self, *_: object) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__self__.__name__ if func.__name__ in ("__get__", "__set__") else func.__name__
        if name in _ANSWERED and func.__name__ != "__set__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, _StandIn):
                leaf.parameter.check()
        first = args[0] if args else None
        if isinstance(first, _StandIn) and (name not in PROPERTIES or func.__name__ == "__get__"):
            taken = step(name, args[1:], kwargs)
            if taken is not None:
                return first._viewed(taken, args[1:], kwargs)
        if has_rule(func):
            output = _served(func, args, kwargs)
            if output is not None:
                return output
        else:
            # A function of torch's without a rule may be written in Python and call one that has a rule.
            inner = inside(func)
            if inner is not None:
                return inner(*args, **kwargs)
        why = f"it meets {name}"
        args, kwargs = pytree.tree_map_only(_StandIn, lambda stand_in: stand_in.drawn(why), (tuple(args), kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> Any:  # type: ignore[override]
        # What did not pass `__torch_function__`: TorchScript, or a transform over the weight. A draw made here, below
        # autograd, would have no gradient.
        (stand_in, *_) = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, _StandIn)]
        raise stand_in.parameter.unforeseen_as(f"it meets {func} where torch functions are not seen")

    def _viewed(self, taken: tuple[str, str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        path, name = (*self.path, taken), taken[0]

        def view(draw: Tensor) -> Any:
            return view_tensor(self._view(draw), name, *args, **kwargs)

        viewed = view_moments(self.moments, name, *args, **kwargs)
        if isinstance(viewed, Moments) and viewed.mu is self.moments.mu:
            return self  # a no-op, such as `.contiguous()` of a contiguous tensor
        if isinstance(viewed, tuple):
            return tuple(
                _StandIn(self.parameter, m, (*path, ("getitem", f"({i},)")), lambda draw, i=i: view(draw)[i])
                for i, m in enumerate(viewed)
            )
        return _StandIn(self.parameter, viewed, path, view)

    def drawn(self, why: str) -> Tensor:
        """The draw of the parameter, in this view."""
        tensor: Tensor = self._view(self.parameter.drawn(why))
        return tensor


def _served(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a rule for an operation that the plan foresees, or None."""
    operation = canonical(func)
    for weight in [a for a in (*args, *kwargs.values()) if isinstance(a, _StandIn)]:
        rule = find_rule(weight.parameter.estimator, operation)
        if rule is None:
            continue
        try:
            arguments = rule.arguments(args, kwargs)
        except TypeError:
            continue
        if not any(arguments.get(argument) is weight for argument in rule.of):
            continue
        foreseen = weight.parameter.serve(weight.path, operation, rule, arguments)
        if foreseen is None:
            continue
        chosen, examples = foreseen
        along = [arguments.get(argument) for argument in chosen.along]
        biases = [
            b for b in along if isinstance(b, _StandIn) and b.parameter.serve(b.path, operation, chosen, arguments)
        ]
        moments = {id(s): s.moments for s in (weight, *biases)}

        def resolved(value: object, moments: dict[int, Moments] = moments, name: str = func.__name__) -> Any:
            if not isinstance(value, _StandIn):
                return value
            return moments[id(value)] if id(value) in moments else value.drawn(f"it meets {name} as another argument")

        for stand_in in (
            weight,
            *biases,
        ):  # first, since another view of this weight can't be drawn beside a rule
            stand_in.parameter.count_use(stand_in.path)
        operands, named = [resolved(a) for a in args], {key: resolved(a) for key, a in kwargs.items()}
        with weight.parameter.noise_of(weight.path):
            return chosen.function(examples, *operands, **named)
    return None
