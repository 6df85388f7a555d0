"""VariationalModule: the user's network as its own mean, with a rho and a prior beside every chosen parameter."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from varify.checkpoints import restored
from varify.errors import EstimatorError, PriorError, StructureError, listed
from varify.graph.examples import count_of
from varify.graph.plans import Plan, Record, in_transform, record, run_planned
from varify.graph.recording import placeholders
from varify.graph.reruns import kept_by_no_checkpoint, may_run_again
from varify.graph.rewriting import refuse
from varify.network.copies import copy_network, weightless_copy
from varify.network.parameters import Site, aliases, places, sites
from varify.network.selection import matching
from varify.network.sharding import gathered, is_sharded, refuse_sharded, whole
from varify.network.signature import has_hooks, kind_of_call
from varify.network.tree import Tree
from varify.posteriors import Posteriors
from varify.prediction.gather import gather
from varify.prediction.sampling import Draws, autocast_acts, many
from varify.priors import Prior
from varify.priors.registry import as_prior
from varify.slots import Slots
from varify.summary import Row, Summary
from varify.weights.draw import draw
from varify.weights.posterior import PRUNED, GaussianPosterior


class VariationalModule(nn.Module):
    """A network with a posterior over its weights; made by `varify.variationalize`.

    Attributes:
        module: the user's network, of the user's own class. Its parameters are the means: a plain checkpoint loads
            into it, and saves from it.
        rho: the rho's of the chosen parameters, under the same names.
        prior: their priors, likewise.
        fixed: masks, likewise, of the parameters that have weights which are not random: 1 at those that stay at
            their mean (the padding row of an embedding), `PRUNED` at those that stay at 0.
    """

    def __init__(
        self,
        network: nn.Module,
        rhos: Mapping[str, nn.Parameter],
        bound_priors: Mapping[str, Prior],
        skipped: dict[str, str],
        estimators: Mapping[str, str],
        strict: bool,
        batch_dim: int,
    ) -> None:
        super().__init__()
        self.module = network
        self.rho = Tree()
        self.prior = Tree()
        self.fixed = Tree()
        for name, rho in rhos.items():
            self.rho.put_leaf(name, rho)
            self.prior.put_leaf(name, bound_priors[name])
        self._chosen = list(rhos)
        self._places = places(network)
        self._skipped = skipped
        self._estimators = dict(estimators)
        self._strict = strict
        self._batch_dim = batch_dim
        self._noise: dict[str, Tensor] | None = None
        self._seed: int | None = None
        self._found: Slots | None = None
        self._sampling: list[bool] = []
        self.training = network.training

    # --- the posteriors

    @property
    def posteriors(self) -> Posteriors:
        """Posterior by parameter name: each distinct tensor once, under its first name; its other names find it too."""
        return Posteriors(self._posteriors(), aliases(self.module))

    def _posteriors(self) -> dict[str, GaussianPosterior]:
        if not torch.compiler.is_compiling():
            return self._slots().posteriors()
        return {
            name: GaussianPosterior(
                whole(self.module.get_parameter(name)),
                whole(self.rho.leaf_at(name)),
                self.prior.leaf_at(name),
                self.fixed.leaf_at(name),
            )
            for name in self._chosen
        }

    def _slots(self) -> Slots:
        if self._found is None or not self._found.fits(self.module):
            everything = sites(self.module)
            lost = [
                name
                for name in self._chosen
                if name not in everything or everything[name].parameter.shape != self.rho.leaf_at(name).shape
            ]
            now = places(self.module)
            lost += [place for place, name in self._places.items() if now.get(place, name) != name]
            if lost:
                raise StructureError(
                    f"{listed(lost)} of vnet.module changed since the conversion, and so has no posterior; "
                    "change the plain network first, then convert it"
                )
            live = {name: everything[name] for name in self._chosen}
            self._found = Slots(self.module, live, self.rho, self.prior, self.fixed)
        return self._found

    # --- forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network with one draw of its weights while training or `sampling`, else with their means.

        Estimators serve in training; `sampling` and `fixed_draw` draw weights.
        """
        if torch.compiler.is_compiling():
            return self._compiled(*args, **kwargs)
        if not (self.training or self._sampling):
            return self._at_means(args, kwargs)
        if self._estimates():
            return self._estimated(args, kwargs)
        slots = self._slots()
        theta = draw(slots.posteriors(), self._noise)
        return slots.views.run(lambda network: network(*args, **kwargs), theta)

    def _estimates(self) -> bool:
        """Whether a forward of the moment has estimators: in training, unless draws are asked for."""
        draws = self._sampling or self._noise is not None
        return self.training and not draws and set(self._estimators.values()) != {"weights"}

    def _estimated(self, args: Any, kwargs: Any) -> Any:
        """A forward with estimators: the first of its kind is recorded, with drawn weights, later ones are planned."""
        slots = self._slots()
        inputs = placeholders(args, kwargs)
        count = count_of(inputs, self._batch_dim)
        # without gradients a forward may take another branch
        kind = (kind_of_call(args, kwargs), count == 1, torch.is_grad_enabled())

        def recorded() -> Any:
            return self._recorded(kind, inputs, args, kwargs)

        def call(network: nn.Module) -> Any:
            return network(*args, **kwargs)

        if kind not in slots.plans:
            return recorded()
        return run_planned(slots.plans[kind], slots.views, slots.posteriors(), count, call, recorded)

    def _recorded(self, kind: Any, inputs: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        slots = self._slots()

        def call(network: nn.Module) -> Any:
            return network(*args, **kwargs)

        if in_transform():  # of torch.func, where values can't be looked at
            if self._strict:
                raise EstimatorError("strict=True: call the module once outside of torch.func's transforms first")
            return slots.views.run(call, draw(slots.posteriors()))
        if may_run_again() or self._strict:  # strict may refuse, and then nothing is to have happened
            with kept_by_no_checkpoint():
                _, plan = self._planned(args, kwargs, slots.plans.get(kind))
            refuse(plan.decisions, self._strict and torch.is_grad_enabled())
            slots.plans[kind] = plan
            return self._estimated(args, kwargs)
        theta = draw(slots.posteriors())
        output, found = slots.views.run(lambda network: record(network, call, inputs, slots.sites), theta)
        slots.plans[kind] = Plan(found, self._estimators, self._batch_dim, slots.plans.get(kind))
        return output

    def _at_means(self, args: Any, kwargs: Any) -> Any:
        pruned = self._pruned()
        if not pruned:
            return self.module(*args, **kwargs)
        theta = {name: q.mean.to(q.mu.dtype) for name, q in pruned.items()}
        return self._slots().views.run(lambda network: network(*args, **kwargs), theta)

    def _compiled(self, *args: Any, **kwargs: Any) -> Any:
        """What torch.compile sees of a forward: drawn weights in the user's code."""
        if self._strict and set(self._estimators.values()) != {"weights"}:
            raise EstimatorError("strict=True: under torch.compile weights are drawn, whatever the estimator")
        if not (self.training or self._sampling):
            theta = {name: q.mean.to(q.mu.dtype) for name, q in self._pruned().items()}
        else:
            theta = draw(self._posteriors(), self._noise)
        if not theta:
            return self.module(*args, **kwargs)
        in_place = {name: theta[first] for name, first in self._places.items() if first in theta}
        return functional_call(self.module, in_place, args, kwargs, tie_weights=False)

    def functional(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """The network as a pure function of its weights, for `torch.func`: `f(theta, *args, **kwargs)`.

        Args:
            args: of an example call, as are `kwargs`; not needed, since f serves any call.
            kwargs: likewise.

        Returns:
            f, in the modes of the moment it is called. `theta` has a tensor of the parameter's shape for every name in
            `posteriors`. What forward sets is forgotten.
        """
        return self.function_of_weights(training=None)

    def function_of_weights(self, training: bool | None) -> Callable[..., Any]:
        """See `functional`; `training` is the mode of all parts, None for those of the moment."""

        def f(theta: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            slots = self._slots()
            lacking = sorted(slots.sites.keys() - theta.keys())
            if lacking:
                raise ValueError(
                    f"theta lacks {listed(lacking)}: a weight for every name in vnet.posteriors is "
                    "needed, such as {name: q.rsample() for name, q in vnet.posteriors.items()}"
                )
            return slots.apart.run(lambda network: network(*args, **kwargs), theta, training)

        return f

    @torch.no_grad()
    def predict(
        self,
        *args: Any,
        n_samples: int = 32,
        outputs: str = "logits",
        class_dim: int = -1,
        vectorize: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Outputs of `n_samples` draws of the weights, with the network in eval mode meanwhile.

        Args:
            args: of the network, as are `kwargs`.
            n_samples: number of draws.
            outputs: what the network returns, for the measures on classes; see `Prediction`.
            class_dim: the classes' dimension in one output.
            vectorize: whether to run several draws at once, by `torch.func.vmap`; by default where it is expected to
                be the faster way. The draws are the same either way, and where an operation can't be vectorised they
                run one after another anyhow.
            kwargs: of the network.

        Returns:
            A `Prediction`; for a network that returns a structure, that structure with a `Prediction` for each tensor;
            for a nested tensor, a tuple of them.

        Raises:
            ValueError: n_samples < 1.
        """
        if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 1:
            raise ValueError(f"n_samples={n_samples!r}: a whole number of draws, at least 1, is needed")
        draws = self.outputs_of_draws(args, kwargs, n_samples, vectorize)
        return gather(draws.outputs, outputs, class_dim, draws.vectorized)

    @torch.no_grad()
    def outputs_of_draws(self, args: Any, kwargs: Any, n_samples: int, vectorize: bool | None) -> Draws:
        """What the network returns in eval mode for each of many draws; see `predict`. What it sets is forgotten."""
        with gathered(self):
            slots = self._slots()
            # copied here and not in the first call, which is watched for tensors that stay alive
            buffers = {id(buffer): buffer.clone() for buffer in self.module.buffers()}

            def call(network: nn.Module) -> Any:
                with _all_sampling(network):
                    return network(*args, **kwargs)

            def run(theta: Mapping[str, Any]) -> Any:
                return slots.apart.run(call, theta, training=False, buffers=buffers)

            kind = kind_of_call(args, kwargs)
            slow = self._slow_vectorized() or kind in slots.sequential or has_hooks(self.module) or autocast_acts()
            draws = many(
                run,
                lambda: draw(self._posteriors(), self._noise),
                n_samples,
                vectorize,
                slow=slow,
                watch=kind not in slots.vectorized,
            )
        if draws.agrees:
            slots.vectorized.add(kind)
        if not (slow or draws.vectorized or draws.keeps) and vectorize is None and n_samples > 1:
            slots.sequential.add(kind)  # it would fail again
        return draws

    def _slow_vectorized(self) -> bool:
        # Convolutions with a weight for each draw become grouped ones, which are two to four times slower on a CPU.
        sites = self._slots().sites.values()
        return any(isinstance(s.owner, nn.modules.conv._ConvNd) and s.parameter.device.type == "cpu" for s in sites)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within, every forward draws its weights, in eval mode as well."""
        with _all_sampling(self):
            yield

    @contextmanager
    def fixed_draw(self, noise: dict[str, Tensor] | None = None) -> Iterator[None]:
        """Within, all forwards use the same noise eps, so that the loss is a function of mu and rho alone.

        The weights are mu + sigma·eps with the mu and sigma of the moment: what a line search or LBFGS needs. An
        estimated divergence is taken at the same draws every time, too; dropout has a noise of its own, and so has the
        importance-weighted bound. All of `predict`'s draws are this one.

        Args:
            noise: eps by parameter name, `(*shape)` each; what is missing is drawn.
        """
        with ExitStack() as stack:
            for part in variational_parts(self):
                stack.enter_context(part.own_noise(dict(noise or {}) if part is self else {}))
            yield

    @contextmanager
    def own_noise(self, noise: dict[str, Tensor]) -> Iterator[None]:
        """`fixed_draw`, but variational modules within keep theirs; `noise` itself gets what is missing."""
        before = self._noise, self._seed
        self._noise, self._seed = noise, None
        try:
            yield
        finally:
            self._noise, self._seed = before

    # --- the divergence

    def kl_divergence(self) -> dict[str, Tensor]:
        """KL(q‖p) by parameter name, each a scalar `()`, nats, differentiable."""
        posteriors = self._posteriors()
        if self._noise is None or torch.compiler.is_compiling():
            return {name: q.kl_divergence() for name, q in posteriors.items()}
        # within `fixed_draw` an estimate, too, is a function of mu and rho: from the same random numbers every time
        self._seed = int(torch.randint(2**62, ())) if self._seed is None else self._seed
        devices = cuda_devices(posteriors)
        with torch.random.fork_rng(devices):
            # not torch.manual_seed, which seeds the generators of all devices, also of those that are not forked
            for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
                generator.manual_seed(self._seed)
            return {name: q.kl_divergence() for name, q in posteriors.items()}

    def prior_loss(self) -> Tensor:
        """Total KL(q‖p), scalar `()`, nats, differentiable; each distinct tensor counts once.

        An unbiased estimate where a prior has no closed form. It depends on the state alone, so it may be called at
        any time and any number of times; neither the weights nor the gradients of a forward are touched. Variational
        modules within the network count as well.
        """
        return prior_loss(self)

    def set_prior(self, prior: Any, *, where: str | Sequence[str] = "*", **hyperparameters: Any) -> None:
        """Give all parameters, or those `where` matches, another prior.

        Args:
            prior: a name ("gaussian", "conjugate", "conjugate_known_mean", "mixtgauss" or a registered one), a
                `varify.priors.Prior`, or a factorised `torch.distributions.Distribution`.
            where: glob, or several, on parameter names.
            hyperparameters: of the named prior.

        Raises:
            PriorError: unknown prior, or a hyper-parameter that is missing, unknown, of a wrong value or shape.
            SelectionError: `where` matches nothing.
        """
        wanted = as_prior(prior, **hyperparameters)
        live, first = self._slots().sites, aliases(self.module)
        chosen = matching([name for name in first if first[name] in live], where)
        bound = {first[name]: bind(wanted, live[first[name]]) for name in chosen}
        for name, new in bound.items():
            self.prior.put_leaf(name, new)

    # --- ordinary networks again

    def mean_model(self) -> nn.Module:
        """An ordinary copy of the user's network with the means for weights."""
        refuse_sharded(self, "mean_model()")
        return self._ordinary(lambda part: {name: q.mean for name, q in part._pruned().items()})

    def sample_model(self) -> nn.Module:
        """An ordinary copy of the user's network with one draw for weights."""
        refuse_sharded(self, "sample_model()")
        return self._ordinary(lambda part: draw(part._posteriors(), part._noise))

    @torch.no_grad()
    def _ordinary(self, weights: Callable[["VariationalModule"], Mapping[str, Tensor]]) -> nn.Module:
        """A copy of the network with these weights, also of the variational modules within it."""
        new = copy_network(self.module)
        for copied, part in zip(variational_parts(new), variational_parts(self.module), strict=True):
            copied._noise = part._noise  # within `fixed_draw`
        inside = sites(new)
        for name, weight in weights(self).items():
            inside[name].parameter.copy_(weight)
        if isinstance(new, VariationalModule):
            return new._ordinary(weights)
        for module in list(new.modules()):
            for name, child in module._modules.items():
                if isinstance(child, VariationalModule):
                    module._modules[name] = child._ordinary(weights)
        return new

    # --- what it looks like

    def summary(self, *inputs: Any, **named: Any) -> Summary:
        """A table, also in notebooks: of each parameter name, shape, prior, estimator or why not, sigma, KL.

        Args:
            inputs: of the network, as is `named`: the table tells what estimators do in such a call. Without, what
                they did in the calls so far.
            named: likewise.
        """
        other_names: dict[str, list[str]] = {}
        for name, first in aliases(self.module).items():
            if name != first:
                other_names.setdefault(first, []).append(name)
        plans = [self._planned(inputs, named)[1]] if inputs or named else list(self._slots().plans.values())
        rows = []
        with torch.no_grad():
            posteriors = self._posteriors()
            for name, site in sites(self.module).items():
                shape = tuple(site.parameter.shape)
                names = (name, *other_names.get(name, ()))
                if name in posteriors:
                    q = posteriors[name]
                    told = self._told_of_estimator(name, plans)
                    rows.append(Row(names, shape, repr(q.prior), told, float(q.sigma.mean()), float(q.kl_divergence())))
                else:
                    rows.append(Row(names, shape, "", self._skipped.get(name, "not chosen")))
        return Summary(type(self.module).__name__, rows)

    def _told_of_estimator(self, name: str, plans: Sequence[Plan]) -> str:
        wanted = self._estimators[name]
        if wanted == "weights":
            return wanted
        found = [plan.decisions[name] for plan in plans]
        told = dict.fromkeys(f"{d.estimator} ({d.why})" if d.why else d.estimator for d in found)
        return "; ".join(told) or f"{wanted}, from the first training call on"

    def graph(self, *inputs: Any, **named: Any) -> fx.GraphModule:
        """A call as a torch.fx graph, with posteriors and rules in the places of parameters and operations.

        What the network does with these inputs is recorded, in its modes of the moment; nothing of it is kept. The
        graph holds for these shapes, and for data that decide alike (`meta["decisions"]`, `meta["decided"]`).

        Args:
            inputs: of the network, as is `named`.
            named: likewise.

        Returns:
            A runnable module: it takes the distinct tensors of the call, and returns those of the output, as a tuple.
        """
        if not inputs and not named:
            raise ValueError("inputs of the network are needed, such as a batch: the call with them is recorded")
        found, plan = self._planned(inputs, named)
        module = found.module(plan.decisions, self._posteriors(), self.module)
        module.meta["decided"] = plan.decided
        return module

    def code(self, *inputs: Any, **named: Any) -> str:
        """The code of `graph(*inputs)`, as Python."""
        module = self.graph(*inputs, **named)
        decided = [f"# data decided: {line}" for line in module.meta["decided"]]
        return "\n".join([*decided, str(module.code).strip(), ""])

    def _planned(
        self, inputs: tuple[Any, ...], named: Mapping[str, Any], before: Plan | None = None
    ) -> tuple[Record, Plan]:
        """A call recorded that leaves nothing behind, and its plan."""
        slots = self._slots()
        posteriors, tensors = slots.posteriors(), placeholders(inputs, named)

        def recorded(network: nn.Module) -> Any:
            return record(network, lambda network: network(*inputs, **named), tensors, slots.sites)

        with torch.random.fork_rng(cuda_devices(posteriors)):
            _, found = slots.apart.run(recorded, draw(posteriors), buffers={})
        estimators = self._estimators if self._estimates() else dict.fromkeys(self._estimators, "weights")
        return found, Plan(found, estimators, self._batch_dim, before)

    def extra_repr(self) -> str:
        """How many parameters are variational."""
        return f"{len(self._chosen)} variational parameter tensors"

    # --- state

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; weights that were pruned are 0 in it."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for name, q in self._pruned().items():
            key = f"{prefix}module.{name}"
            state[key] = state[key].masked_fill(torch.as_tensor(q.fixed == PRUNED), 0.0)
        return state

    def get_extra_state(self) -> dict[str, Any]:
        """Priors with their hyper-parameters, and estimators, as numbers and strings."""
        told = {name: {"kind": q.prior.kind, **q.prior.settings()} for name, q in self._posteriors().items()}
        masked = [name for name in self._chosen if self.fixed.leaf_at(name) is not None]
        return {"priors": told, "estimators": dict(self._estimators), "fixed": masked}

    def set_extra_state(self, state: Any) -> None:
        """Take the priors of a checkpoint, all or none. Names that are not here are left to torch's report of keys."""
        told = restored(state, {name: self.rho.leaf_at(name) for name in self._chosen})
        for name, prior in told.priors.items():
            self.prior.put_leaf(name, prior)
        self._estimators.update(told.estimators)
        self.fixed = Tree()
        for name in told.fixed:
            self.fix(name, torch.zeros(self.rho.leaf_at(name).shape, dtype=torch.int8))
        self._found = None

    @torch.no_grad()
    def fix(self, name: str, mask: Tensor) -> None:
        """Give a parameter the mask `fixed`, `(*shape)`; weights that are `PRUNED` become 0."""
        mask = mask.to(torch.int8).to(self.rho.leaf_at(name).device)
        self.fixed.put_leaf(name, mask)
        mu = self._slots().sites[name].parameter
        mu.masked_fill_(mask == PRUNED, 0.0)

    def train(self, mode: bool = True) -> "VariationalModule":
        """As in torch: `train()` draws the weights, `eval()` uses their means."""
        with torch.no_grad():  # an optimizer's momentum may have moved them
            for q in self._pruned().values():
                q.mu.masked_fill_(torch.as_tensor(q.fixed == PRUNED), 0.0)
        super().train(mode)
        return self

    def _pruned(self) -> dict[str, GaussianPosterior]:
        """The posteriors that have weights held at 0, whatever an optimizer's momentum does to the means."""
        if next(self.fixed.named_buffers(), None) is None:
            return {}
        return {name: q for name, q in self._posteriors().items() if q.fixed is not None}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch, but all or nothing: where torch would refuse halfway, nothing has changed yet."""
        if is_sharded(self):  # it can't be copied, and torch has matched the state to its parts
            return super().load_state_dict(state_dict, strict, assign)
        trial = weightless_copy(self)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that copying to the meta device does nothing, which is the point
                nn.Module.load_state_dict(trial, state_dict, strict)
        except RuntimeError as error:
            if state_dict and set(state_dict) & set(self.module.state_dict()):
                raise RuntimeError(
                    f"{error}\n\tThis looks like a checkpoint of the plain network. "
                    "Load it as the means: vnet.module.load_state_dict(...)"
                ) from None
            raise
        first = places(self.module)
        before = dict(self.module.named_parameters(remove_duplicate=False))
        found = super().load_state_dict(state_dict, strict, assign)
        if assign:
            self._tie_again(first, before)
        return found

    def _tie_again(self, first: Mapping[str, str], before: Mapping[str, nn.Parameter]) -> None:
        """Undo that `assign` gives each place of a tied parameter a tensor of its own."""
        now = dict(self.module.named_parameters(remove_duplicate=False))
        new = {first[place]: now[place] for place in reversed(list(first)) if now[place] is not before[place]}
        for place, name in first.items():
            if name in new and now[place] is not new[name]:
                path, _, attr = place.rpartition(".")
                setattr(dict(self.module.named_modules(remove_duplicate=False))[path], attr, new[name])

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Those of the network, which is what `swa_utils.AveragedModel` pairs off to average.

        `named_buffers` has the hyper-parameters of priors and the masks of pruned weights as well, which come and go.
        """
        return self.module.buffers(recurse)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VariationalModule":
        self._found = None
        super()._apply(fn, recurse)
        return self

    def state_of_a_copy(self) -> dict[str, Any]:
        """What a copy of this module has of its own: what was found out is found out again; contexts end here."""
        return {"_found": None, "_noise": None, "_seed": None, "_sampling": []}

    def state_of_a_view(self) -> dict[str, Any]:
        """What a view of this module has in a call: the contexts of the moment, of which it may enter more."""
        return {"_noise": self._noise, "_seed": self._seed, "_sampling": list(self._sampling)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **self.state_of_a_copy()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "VariationalModule":
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        state = self.__getstate__()
        state["_modules"] = {
            name: copy_network(child, memo) for name, child in self._modules.items() if child is not None
        }
        new.__setstate__(copy.deepcopy(state, memo))
        return new


def cuda_devices(posteriors: Mapping[str, GaussianPosterior]) -> list[int]:
    """Of the parameters, for `torch.random.fork_rng`."""
    return sorted({q.rho.device.index for q in posteriors.values() if q.rho.is_cuda})


def variational_parts(module: nn.Module) -> list[VariationalModule]:
    """All variational modules within `module`, itself too."""
    return [part for part in module.modules() if isinstance(part, VariationalModule)]


@contextmanager
def _all_sampling(module: nn.Module) -> Iterator[None]:
    """Within, every variational module within `module` draws its weights in eval mode as well."""
    parts = variational_parts(module)
    for part in parts:
        part._sampling.append(True)  # and not a count: this is one step, whatever other threads do
    try:
        yield
    finally:
        for part in parts:
            part._sampling.pop()


def bind(prior: Prior, site: Site) -> Prior:
    """`prior` made that of the parameter at `site`; an error names the parameter."""
    try:
        return prior.for_parameter(site.parameter.detach(), site.fan_in)
    except PriorError as error:
        raise PriorError(f"{site.name}: {error}") from None


def prior_loss(module: nn.Module) -> Tensor:
    """Sum of KL(q‖p) over every variational module within `module`, scalar `()`, nats, differentiable.

    For a network of which only a part is variational, such as a Bayesian head on a plain body.
    """
    terms = [term for part in variational_parts(module) for term in part.kl_divergence().values()]
    if not terms:
        return torch.zeros(())
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()
