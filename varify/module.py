"""VariationalModule: the user's network as its own mean, with a rho and a prior beside every variational parameter."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varify import state
from varify.compiled import paired, run_compiled
from varify.graph.engine import Engine, GraphModule, code_of
from varify.posteriors import Posteriors, Settings, Trees
from varify.predicting import Predicting
from varify.priors.registry import PriorLike
from varify.propagation.propagate import propagate
from varify.summary import Summary, summarize
from varify.weights.draw import Drawing
from varify.within import copied_children, ordinary, prior_loss, sampling, variational_parts


class VariationalModule(Predicting):
    """A network with a posterior over its weights; made by `varify.variationalize`.

    Attributes:
        module: the user's network, of the user's own class. Its parameters are the means: a plain checkpoint loads
            into it, and saves from it.
        rho: the rho's of the variational parameters, under the same names.
        prior: their priors, likewise.
        fixed: masks, likewise, of the parameters that have weights which are not random: 1 at those that stay at
            their mean (the padding row of an embedding), `PRUNED` at those that stay at 0.
        drawing: how weights are drawn at the moment.
    """

    # What a view of this module has of its own; see `varify.network.parts`.
    transient: ClassVar = ("_engine", "drawing")

    def __init__(self, network: nn.Module, trees: Trees, settings: Settings) -> None:
        super().__init__()
        self.module = network
        self.rho, self.prior, self.fixed = trees
        self._settings = settings
        self.drawing = Drawing()
        self._engine: Engine | None = None
        self.training = network.training

    @property
    def engine(self) -> Engine:
        """What runs the network with other weights; a new one if the network was rebuilt."""
        if self._engine is None or not self._engine.posteriors.fits(self.module):
            self._engine = Engine(Posteriors(self.module, _trees(self), self._settings))
        return self._engine

    @property
    def posteriors(self) -> Posteriors:
        """Posterior by parameter name: each distinct tensor once, under its first name; its other names find it too."""
        return self.engine.posteriors

    def forward(self, *args: object, **kwargs: object) -> Any:
        """The network with one draw of its weights while training or `sampling`, else with their means.

        Estimators serve in training, but for `sampling` and `fixed_draw`.
        """
        draws = self.training or self.drawing.always
        if torch.compiler.is_compiling():
            drawing = self.drawing if draws else None
            return run_compiled(self.module, _trees(self), self._settings, drawing, args, kwargs)
        if not draws and self.fixed.is_empty:
            return self.module(*args, **kwargs)
        engine = self.engine
        if _estimates(self):
            return engine.estimate(args, kwargs)
        posteriors = engine.posteriors
        return engine.run(posteriors.draw(self.drawing.noise) if draws else posteriors.masked_means(), args, kwargs)

    def functional(self, *args: object, **kwargs: object) -> Callable[..., Any]:
        """The network as a pure function of its weights, for `torch.func`: `f(theta, *args, **kwargs)`.

        Args:
            args: of an example call, as are `kwargs`; not needed, since f serves any call.
            kwargs: likewise.

        Returns:
            f, in the modes of the moment it is called. `theta` has a tensor of the parameter's shape for every name in
            `posteriors`. What forward sets is forgotten.
        """

        def f(theta: Mapping[str, Any], *args: object, **kwargs: object) -> Any:
            return self.engine.call_with(theta, args, kwargs, training=None)

        return f

    propagate = propagate

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within, every forward draws its weights, in eval mode as well."""
        with sampling(self):
            yield

    @contextmanager
    def fixed_draw(self, noise: dict[str, Tensor] | None = None) -> Iterator[None]:
        """Within, all forwards use the same noise eps, so that the loss is a function of mu and rho alone.

        The weights are mu + sigma·eps with the mu and sigma of the moment: what a line search or LBFGS needs. An
        estimated divergence is taken at the same draws every time, too; dropout has a noise of its own, and so has the
        importance-weighted bound, and an estimated divergence under torch.compile. `predict`'s draws are this one.

        Args:
            noise: eps by parameter name, `(*shape)` each; what is missing is drawn.
        """
        self.posteriors.check_noise(noise or {})
        with ExitStack() as stack:
            for part in variational_parts(self):
                stack.enter_context(part.drawing.fixed(dict(noise or {}) if part is self else {}))
            yield

    def kl_divergence(self) -> dict[str, Tensor]:
        """KL(q‖p) by parameter name, each a scalar `()`, nats, differentiable."""
        if torch.compiler.is_compiling():
            return {name: q.kl_divergence() for name, q in paired(self.module, _trees(self), self._settings).items()}
        return self.posteriors.kl_divergence(self.drawing)

    def prior_loss(self) -> Tensor:
        """Total KL(q‖p), scalar `()`, nats, differentiable; each distinct tensor counts once.

        An unbiased estimate where a prior has no closed form. It depends on the state alone and touches no forward, so
        it may be called at any time. Variational modules within the network count as well.
        """
        return prior_loss(self)

    def set_prior(self, prior: PriorLike, *, where: str | Sequence[str] = "*", **hyperparameters: object) -> None:
        """Give all parameters, or those `where` matches, another prior.

        Args:
            prior: a name ("gaussian", "conjugate", "conjugate_known_mean", "mixtgauss" or a registered one), a
                `varify.priors.Prior`, or a factorized `torch.distributions.Distribution`.
            where: glob, or several, on parameter names.
            hyperparameters: of the named prior.

        Raises:
            PriorError: unknown prior, or a hyper-parameter that is missing, unknown, of a wrong value or shape.
            SelectionError: `where` matches nothing.
        """
        self.posteriors.set_prior(prior, where, **hyperparameters)

    def mean_model(self) -> nn.Module:
        """An ordinary copy of the user's network with the means for weights."""
        return ordinary(self, lambda part: part.posteriors.masked_means(), "mean_model()")

    def sample_model(self) -> nn.Module:
        """An ordinary copy of the user's network with one draw for weights."""
        return ordinary(self, lambda part: part.posteriors.draw(part.drawing.noise), "sample_model()")

    def summary(self, *inputs: object, **named: object) -> Summary:
        """A table, also in notebooks: of each parameter name, shape, prior, estimator or why not, sigma, KL.

        Args:
            inputs: of the network, as is `named`: the table tells what estimators do in such a call. Without, what
                they did in the calls so far.
            named: likewise.
        """
        engine, given = self.engine, bool(inputs or named)
        plans = [engine.plan_of(inputs, named, estimates=_estimates(self))[1]] if given else engine.plans.values()
        return summarize(engine.posteriors, [plan.decisions for plan in plans])

    def graph(self, *inputs: object, **named: object) -> GraphModule:
        """A call as a torch.fx graph, with posteriors and rules in the places of parameters and operations.

        The call is recorded in the modes of the moment, and forgotten. The graph holds for these shapes, and for data
        that decide alike (`meta["decisions"]`, `meta["decided"]`).

        Args:
            inputs: of the network, as is `named`.
            named: likewise.

        Returns:
            A runnable module: it takes the distinct tensors of the call, and returns those of the output, as a tuple.
        """
        return self.engine.graph(inputs, named, estimates=_estimates(self))

    def code(self, *inputs: object, **named: object) -> str:
        """The code of `graph(*inputs)`, as Python."""
        return code_of(self.graph(*inputs, **named))

    def extra_repr(self) -> str:
        """How many parameters are variational."""
        return f"{len(self._settings.names)} variational parameter tensors"

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; weights that were pruned are 0 in it."""
        found = super().state_dict(*args, **kwargs)
        state.zero_pruned(found, kwargs.get("prefix", args[1] if len(args) > 1 else ""), self.posteriors)
        return found

    def get_extra_state(self) -> Tensor:
        """Priors with their hyper-parameters, estimators and masks; see `varify.state`."""
        return state.extra_state(self.posteriors)

    def set_extra_state(self, extra: object) -> None:
        """Take the priors of a checkpoint, all or none. Names that are not here are left to torch's report of keys."""
        before = dict(self._settings.estimators)
        state.restore(self.posteriors, extra)
        if self._settings.estimators != before:
            self._engine = None  # whose plans are of those

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch, but all or nothing: where torch would refuse halfway, nothing has changed yet."""
        with state.loading(self, self.module, state_dict, strict, assign):
            return super().load_state_dict(state_dict, strict, assign)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Those of the network, which is what `swa_utils.AveragedModel` pairs off to average.

        `named_buffers` has the hyper-parameters of priors and the masks of pruned weights as well, which come and go.
        """
        return self.module.buffers(recurse)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VariationalModule":
        self._engine = None  # whose plans know devices
        super()._apply(fn, recurse)
        return self

    def state_of_a_view(self) -> dict[str, Any]:
        """What a view of this module has in a call: the contexts of the moment, of which it may enter more."""
        return {"drawing": self.drawing.copy()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "VariationalModule":
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        children = copied_children(self, memo)
        own = {key: copy.deepcopy(value, memo) for key, value in self.__dict__.items() if key != "_modules"}
        new.__setstate__({**own, "_modules": children})
        return new


def _trees(vnet: VariationalModule) -> Trees:
    return Trees(vnet.rho, vnet.prior, vnet.fixed)


def _estimates(vnet: VariationalModule) -> bool:
    """Whether a forward of the moment has estimators: in training, unless draws are asked for."""
    draws = vnet.drawing.always or vnet.drawing.noise is not None
    return vnet.training and not draws and vnet._settings.wants_estimators
