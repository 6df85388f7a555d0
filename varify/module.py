"""VariationalModule: the user's network as its own mean, with a rho and a prior beside every chosen parameter."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from varify import priors
from varify.calls import Unkeyable, mode_of, take_apart
from varify.copies import copy_network, weightless_copy
from varify.errors import PriorError, StructureError, listed
from varify.posteriors import GaussianPosterior, draw
from varify.prediction import gather
from varify.priors import Prior
from varify.rewriting import Program, rewrite
from varify.selection import Site, aliases, matching, sites
from varify.summary import Row, Summary
from varify.tracing import opaque_trace, trace
from varify.trees import Tree

# A call whose constants change all the time (a step counter, a temperature) would fill the cache; beyond this many
# programs the network runs as one opaque node, which serves every call.
MOST_PROGRAMS = 64


@dataclass
class _Cache:
    """What is made again when needed, and so is neither copied nor pickled."""

    programs: dict[Any, Program] = field(default_factory=dict)
    sites: dict[str, Site] | None = None
    modules: tuple[nn.Module, ...] = ()


class VariationalModule(nn.Module):
    """A network with a posterior over its weights; made by `varify.variationalize`.

    Attributes:
        module: the user's network, of the user's own class. Its parameters are the means: a plain checkpoint loads
            into it, and saves from it.
        rho: the rho's of the chosen parameters, under the same names.
        prior: their priors, likewise.
    """

    runs_opaque = True  # within another variational module: it draws for itself

    def __init__(
        self,
        network: nn.Module,
        rhos: Mapping[str, nn.Parameter],
        bound_priors: Mapping[str, Prior],
        skipped: dict[str, str],
    ) -> None:
        super().__init__()
        self.module = network
        self.rho = Tree()
        self.prior = Tree()
        for name, rho in rhos.items():
            self.rho.put(name, rho)
            self.prior.put(name, bound_priors[name])
        self._chosen = list(rhos)
        self._skipped = skipped
        self._sampling = False
        self._fixed: dict[str, Tensor] | None = None
        self._cache = _Cache()
        self.training = network.training

    # --- the posteriors

    @property
    def posteriors(self) -> "Posteriors":
        """Posterior by parameter name: each distinct tensor once, under its first name; its other names find it too."""
        return Posteriors(self._posteriors(), aliases(self.module))

    def _posteriors(self) -> dict[str, GaussianPosterior]:
        return {
            name: GaussianPosterior(site.parameter, self.rho.get(name), self.prior.get(name))
            for name, site in self._live_sites().items()
        }

    def _live_sites(self) -> dict[str, Site]:
        if self._cache.sites is None:
            everything = sites(self.module)
            lost = [name for name in self._chosen if name not in everything]
            lost += [
                n for n in self._chosen if n not in lost and everything[n].parameter.shape != self.rho.get(n).shape
            ]
            if lost:
                raise StructureError(
                    f"{listed(lost)} of vnet.module changed since the conversion, and so has no posterior; "
                    "change the plain network first, then convert it"
                )
            self._cache.sites = {name: everything[name] for name in self._chosen}
        return self._cache.sites

    # --- forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network with one draw of its weights while training or `sampling`, else with their means."""
        if not (self.training or self._sampling):
            return self.module(*args, **kwargs)
        program, tensors = self._program(args, kwargs)
        return program(self, draw(self._posteriors(), self._fixed), tensors)

    def _program(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Program, list[Tensor]]:
        modules = tuple(self.module.modules())
        if modules != self._cache.modules:  # the first call, or somebody changed the tree
            self._cache = _Cache(modules=modules)
        cache, live = self._cache.programs, self._live_sites()
        try:
            layout, tensors = take_apart(args, kwargs)
        except Unkeyable as error:
            return self._unkeyed(str(error), args, kwargs)
        key = (layout.key, mode_of(modules), bool(nn.modules.module._has_any_global_hook()))
        shaped = (key, tuple(t.shape for t in tensors))
        program = cache.get(key) or cache.get(shaped)
        if program is None and len(cache) >= MOST_PROGRAMS:
            return self._unkeyed(f"more than {MOST_PROGRAMS} kinds of calls", args, kwargs)
        if program is None:
            program = rewrite(trace(self.module, layout, tensors, live), live)
            cache[shaped if program.needs_shapes else key] = program
        return program, tensors

    def _unkeyed(self, why: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Program, list[Any]]:
        """A program for any arguments whatever: the network as one opaque node."""
        cache = self._cache.programs
        if why not in cache:
            cache[why] = rewrite(opaque_trace(None, self._live_sites(), why), self._live_sites())
        return cache[why], [args, dict(kwargs)]

    @torch.no_grad()
    def predict(
        self, *args: Any, n_samples: int = 32, outputs: str = "logits", class_dim: int = -1, **kwargs: Any
    ) -> Any:
        """Outputs of `n_samples` draws of the weights, with the network in eval mode meanwhile.

        Args:
            args: of the network, as are `kwargs`.
            n_samples: number of draws.
            outputs: what the network returns, for the measures on classes; see `Prediction`.
            class_dim: the classes' dimension in one output.
            kwargs: of the network.

        Returns:
            A `Prediction`; for a network that returns a structure, that structure with a `Prediction` for each tensor.

        Raises:
            ValueError: n_samples < 1.
        """
        if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 1:
            raise ValueError(f"n_samples={n_samples!r}: a whole number of draws, at least 1, is needed")
        with self._in_eval(), self.sampling():
            return gather([self(*args, **kwargs) for _ in range(n_samples)], outputs, class_dim)

    @contextmanager
    def _in_eval(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.modules() if module.training]
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within, every forward draws its weights, in eval mode as well."""
        before, self._sampling = self._sampling, True
        try:
            yield
        finally:
            self._sampling = before

    @contextmanager
    def fixed_draw(self) -> Iterator[None]:
        """Within, all forwards use the same noise eps, so that the loss is a function of mu and rho alone.

        The weights are mu + sigma·eps with the mu and sigma of the moment: what a line search or LBFGS needs.
        """
        before, self._fixed = self._fixed, {}
        try:
            yield
        finally:
            self._fixed = before

    # --- the divergence

    def kl_divergence(self) -> dict[str, Tensor]:
        """KL(q‖p) by parameter name, each a scalar `()`, nats, differentiable."""
        return {name: q.kl_divergence() for name, q in self._posteriors().items()}

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
        wanted = priors.make(prior, **hyperparameters)
        live = self._live_sites()
        bound = {name: bind(wanted, live[name]) for name in matching(live, where)}
        for name, new in bound.items():
            self.prior.put(name, new)

    # --- ordinary networks again

    def mean_model(self) -> nn.Module:
        """An ordinary copy of the user's network with the means for weights."""
        return copy_network(self.module)

    @torch.no_grad()
    def sample_model(self) -> nn.Module:
        """An ordinary copy of the user's network with one draw for weights."""
        theta = draw(self._posteriors(), self._fixed)
        sample = copy_network(self.module)
        for name, site in sites(sample).items():
            if name in theta:
                site.parameter.copy_(theta[name])
        return sample

    # --- what it looks like

    def summary(self) -> Summary:
        """A table, also in notebooks: of each parameter name, shape, prior, estimator or why not, sigma, KL."""
        other_names: dict[str, list[str]] = {}
        for name, first in aliases(self.module).items():
            if name != first:
                other_names.setdefault(first, []).append(name)
        rows = []
        with torch.no_grad():
            posteriors = self._posteriors()
            for name, site in sites(self.module).items():
                shape = tuple(site.parameter.shape)
                names = (name, *other_names.get(name, ()))
                if name in posteriors:
                    q = posteriors[name]
                    rows.append(
                        Row(names, shape, repr(q.prior), "weights", float(q.sigma.mean()), float(q.kl_divergence()))
                    )
                else:
                    rows.append(Row(names, shape, "", self._skipped.get(name, "not chosen")))
        opaque = {path: why for program in self._cache.programs.values() for path, why in program.opaque.items()}
        return Summary(type(self.module).__name__, rows, opaque)

    def code(self, *args: Any, **kwargs: Any) -> str:
        """The programs made so far as Python; with arguments, the one for such a call."""
        if args or kwargs:
            return self._program(args, kwargs)[0].source
        if not self._cache.programs:
            return "# no program yet: one is made by the first training call, or by code(*inputs)\n"
        return "\n\n".join(dict.fromkeys(program.source for program in self._cache.programs.values()))

    def extra_repr(self) -> str:
        """How many parameters are variational."""
        return f"{len(self._chosen)} variational parameter tensors"

    # --- state

    def get_extra_state(self) -> dict[str, Any]:
        """Priors with their hyper-parameters, as numbers and strings."""
        told = {name: {"kind": q.prior.kind, **q.prior.settings()} for name, q in self._posteriors().items()}
        return {"priors": told}

    def set_extra_state(self, state: Any) -> None:
        """Take the priors of a checkpoint. Names that are not here are left to torch's report of keys."""
        made = {}
        for name, told in state["priors"].items():
            settings = {key: value for key, value in told.items() if key != "kind"}
            if told["kind"] not in priors.KINDS:
                raise PriorError(
                    f"the checkpoint has a prior of kind {told['kind']!r} for {name}; import the module that registers "
                    f"it before loading (known: {listed(priors.KINDS, 99)})"
                )
            if name in self._chosen:
                made[name] = priors.KINDS[told["kind"]].from_settings(settings).to(self.rho.get(name).device)
        for name, prior in made.items():
            self.prior.put(name, prior)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch, but all or nothing: where torch would refuse halfway, nothing has changed yet."""
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
        return super().load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VariationalModule":
        self._cache = _Cache()
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": _Cache(), "_fixed": None, "_sampling": False}

    def __deepcopy__(self, memo: dict[int, Any]) -> "VariationalModule":
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        state = self.__getstate__()
        state["_modules"] = {
            name: copy_network(child, memo) for name, child in self._modules.items() if child is not None
        }
        new.__setstate__(copy.deepcopy(state, memo))
        return new


class Posteriors(Mapping[str, GaussianPosterior]):
    """Posterior by parameter name; iterates over first names, finds the others too."""

    def __init__(self, posteriors: dict[str, GaussianPosterior], first_names: dict[str, str]) -> None:
        self._posteriors, self._first_names = posteriors, first_names

    def __getitem__(self, name: str) -> GaussianPosterior:
        first = self._first_names.get(name, name)
        if first not in self._posteriors:
            raise KeyError(f"{name!r} has no posterior; there are {listed(self._posteriors)}")
        return self._posteriors[first]

    def __iter__(self) -> Iterator[str]:
        return iter(self._posteriors)

    def __len__(self) -> int:
        return len(self._posteriors)

    def __repr__(self) -> str:
        return f"Posteriors({listed(self._posteriors)})"


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
    inside = [m for m in module.modules() if isinstance(m, VariationalModule)]
    terms = [term for variational in inside for term in variational.kl_divergence().values()]
    if not terms:
        return torch.zeros(())
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()
