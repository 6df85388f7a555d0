"""VariationalModule: the user's network as its own mean, with a rho and a prior beside every chosen parameter."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from varify import factorised, priors  # noqa: F401  # factorised registers itself
from varify.checkpoints import restored
from varify.copies import copy_network, weightless_copy
from varify.draws import many
from varify.errors import EstimatorError, PriorError, StructureError, listed
from varify.estimators import Moments
from varify.modes import Modes
from varify.posteriors import PRUNED, GaussianPosterior, Posteriors, draw
from varify.prediction import gather
from varify.priors import Prior
from varify.programs import Programs
from varify.rewriting import Program
from varify.selection import Site, aliases, matching, places, sites
from varify.sharding import gathered, is_sharded, refuse_sharded, whole
from varify.snapshots import unchanged
from varify.summary import Row, Summary
from varify.swapping import Swap
from varify.trees import Tree
from varify.turns import Turns


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

    runs_opaque = True  # within another variational module: it draws for itself

    def __init__(
        self,
        network: nn.Module,
        rhos: Mapping[str, nn.Parameter],
        bound_priors: Mapping[str, Prior],
        skipped: dict[str, str],
        estimators: Mapping[str, str],
        strict: bool,
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
        self._noise: dict[str, Tensor] | None = None
        self._seed: int | None = None
        self._programs: Programs | None = None
        self._turns = Turns()
        self._modes = Modes()
        self.training = network.training

    # --- the posteriors

    @property
    def posteriors(self) -> Posteriors:
        """Posterior by parameter name: each distinct tensor once, under its first name; its other names find it too."""
        return Posteriors(self._posteriors(), aliases(self.module))

    def _posteriors(self) -> dict[str, GaussianPosterior]:
        if torch.compiler.is_compiling():  # a compiler can follow this, but no locks
            return {
                name: GaussianPosterior(
                    self.module.get_parameter(name),
                    self.rho.leaf_at(name),
                    self.prior.leaf_at(name),
                    self.fixed.leaf_at(name),
                )
                for name in self._chosen
            }
        with self._turns.reading():
            return {
                name: GaussianPosterior(
                    whole(site.parameter),
                    whole(self.rho.leaf_at(name)),
                    self.prior.leaf_at(name),
                    self.fixed.leaf_at(name),
                )
                for name, site in self._live_programs().sites.items()
            }

    def _live_programs(self) -> Programs:
        if self._programs is None or not self._programs.fits(self.module):
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
            self._programs = Programs(self.module, {name: everything[name] for name in self._chosen})
        return self._programs

    # --- forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network with one draw of its weights while training or `sampling`, else with their means.

        Estimators serve in training; `sampling` and `fixed_draw` draw weights.
        """
        if torch.compiler.is_compiling():
            return self._compiled(*args, **kwargs)
        if not (self.training or self._modes.draws):
            with self._turns.reading():
                return self.module(*args, **kwargs)
        estimating = self.training and not self._modes.draws and self._noise is None
        wanted = {name: e for name, e in self._estimators.items() if e != "weights"} if estimating else {}
        program, tensors = self._find(args, kwargs, wanted, self._strict)
        return self._run_as_written(program, self._theta(program), tensors)

    def _compiled(self, *args: Any, **kwargs: Any) -> Any:
        """What torch.compile sees of a forward: it makes a program of its own, of drawn weights in the user's code."""
        if self._strict and set(self._estimators.values()) != {"weights"}:
            raise EstimatorError("strict=True: under torch.compile weights are drawn, whatever the estimator")
        if not (self.training or self._modes.draws):
            return self.module(*args, **kwargs)
        theta = draw(self._posteriors(), self._noise)
        in_place = {name: theta[first] for name, first in self._places.items() if first in theta}
        return functional_call(self.module, in_place, args, kwargs, tie_weights=False)

    def _find(
        self, args: Any, kwargs: Any, wanted: Mapping[str, str] | None = None, strict: bool = False
    ) -> tuple[Program, list[Any]]:
        """The program for a call, and what to run it on."""
        with self._turns.reading():
            return self._live_programs().find(args, kwargs, wanted or {}, strict)

    def _run(self, program: Program, theta: Mapping[str, Any], tensors: Sequence[Any]) -> Any:
        with self._turns.writing() if program.swaps else nullcontext():
            return program(self, theta, tensors)

    def _run_as_written(self, program: Program, theta: Mapping[str, Any], tensors: Sequence[Any]) -> Any:
        """`_run`, in which an error is raised where the user's own code has it: that runs again, with the same weights.

        Where an estimator draws outputs and not weights, with its means.
        """
        try:
            return self._run(program, theta, tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if "" in program.opaque:  # it was the user's own code that ran
                raise
            failed = error
        args, kwargs = program.call_of(tensors)
        weights = {name: w.mu if isinstance(w, Moments) else w for name, w in theta.items()}
        with unchanged(self.module):
            Swap(self.module, weights, self._turns).call(self.module, *args, **kwargs)
        raise failed

    def _theta(self, program: Program) -> dict[str, Any]:
        """What a program is given for the parameters: a draw, or the moments of those it has an estimator for."""
        posteriors = self._posteriors()
        estimated = {name for name, (estimator, _) in program.estimators.items() if estimator != "weights"}
        theta: dict[str, Any] = draw({n: q for n, q in posteriors.items() if n not in estimated}, self._noise)
        for name in estimated:
            q = posteriors[name]
            theta[name] = Moments(q.mean.to(q.mu.dtype), q.sigma)
        return theta

    def functional(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """The network as a pure function of its weights, for `torch.func`: `f(theta, *args, **kwargs)`.

        Args:
            args: of an example call, as are `kwargs`: f serves calls with tensors in the same places (and everything
                else equal), in the modes of the moment.
            kwargs: likewise.

        Returns:
            f; `theta` has a tensor of the parameter's shape for every name in `posteriors`.
        """
        program, _ = self._find(args, kwargs)
        names = set(self._live_programs().sites)

        def f(theta: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            if not names <= set(theta):
                raise ValueError(
                    f"theta lacks {listed(sorted(names - set(theta)))}: a weight for every name in vnet.posteriors is "
                    "needed, such as {name: q.rsample() for name, q in vnet.posteriors.items()}"
                )
            return self._run(program, theta, program.tensors_of(args, kwargs))

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
            A `Prediction`; for a network that returns a structure, that structure with a `Prediction` for each tensor.

        Raises:
            ValueError: n_samples < 1.
        """
        if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 1:
            raise ValueError(f"n_samples={n_samples!r}: a whole number of draws, at least 1, is needed")
        with self.in_eval(), gathered(self):
            program, tensors = self._find(args, kwargs)
            slow = self._slow_at_once()
            draws, vectorized = many(
                lambda theta: self._run(program, theta, tensors),
                lambda: draw(self._posteriors(), self._noise),
                n_samples,
                False if program.sets_attributes else vectorize,
                slow=slow or program.one_by_one,
                alone=lambda theta: self._run_as_written(program, theta, tensors),
            )
            program.one_by_one |= vectorize is None and not slow and not vectorized
        return gather(draws, outputs, class_dim, vectorized)

    def _slow_at_once(self) -> bool:
        # Convolutions with a weight for each draw become grouped ones, which are two to four times slower on a CPU.
        sites = self._live_programs().sites.values()
        return any(isinstance(s.owner, nn.modules.conv._ConvNd) and s.parameter.device.type == "cpu" for s in sites)

    @contextmanager
    def in_eval(self) -> Iterator[None]:
        """Within, all parts are in eval mode; as they were afterwards, also after an exception."""
        with self._modes.in_eval(self):
            yield

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within, every forward draws its weights, in eval mode as well."""
        with self._modes.sampling():
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
        before = self._noise, self._seed
        self._noise, self._seed = dict(noise or {}), None
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
        devices = {q.rho.device.index for q in posteriors.values() if q.rho.is_cuda}
        with torch.random.fork_rng(sorted(devices)):
            torch.manual_seed(self._seed)
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
        wanted = priors.make(prior, **hyperparameters)
        live = self._live_programs().sites
        bound = {name: bind(wanted, live[name]) for name in matching(live, where)}
        for name, new in bound.items():
            self.prior.put_leaf(name, new)

    # --- ordinary networks again

    def mean_model(self) -> nn.Module:
        """An ordinary copy of the user's network with the means for weights."""
        refuse_sharded(self, "mean_model()")
        self._hold_pruned()
        with self._turns.reading():
            return copy_network(self.module)

    @torch.no_grad()
    def sample_model(self) -> nn.Module:
        """An ordinary copy of the user's network with one draw for weights."""
        refuse_sharded(self, "sample_model()")
        theta = draw(self._posteriors(), self._noise)
        with self._turns.reading():
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
        programs = self._live_programs().made.values()
        with torch.no_grad():
            posteriors = self._posteriors()
            for name, site in sites(self.module).items():
                shape = tuple(site.parameter.shape)
                names = (name, *other_names.get(name, ()))
                if name in posteriors:
                    q = posteriors[name]
                    told = self._told_of_estimator(name)
                    rows.append(Row(names, shape, repr(q.prior), told, float(q.sigma.mean()), float(q.kl_divergence())))
                else:
                    rows.append(Row(names, shape, "", self._skipped.get(name, "not chosen")))
        opaque = {path: why for program in programs for path, why in program.opaque.items()}
        return Summary(type(self.module).__name__, rows, opaque)

    def _told_of_estimator(self, name: str) -> str:
        wanted = self._estimators[name]
        if wanted == "weights":
            return wanted
        found = [p.estimators[name] for p in self._live_programs().made.values() if name in p.estimators]
        told = dict.fromkeys(f"{e} ({why})" if why else e for e, why in found if e != "weights" or why)
        return "; ".join(told) or f"{wanted}, from the first training call on"

    def code(self, *args: Any, **kwargs: Any) -> str:
        """The programs made so far as Python; with arguments, the one that draws weights for such a call."""
        programs = self._live_programs()
        if args or kwargs:
            return self._find(args, kwargs)[0].source
        if not programs.made:
            return "# no program yet: one is made by the first training call, or by code(*inputs)\n"
        return "\n\n".join(dict.fromkeys(program.source for program in programs.made.values()))

    def extra_repr(self) -> str:
        """How many parameters are variational."""
        return f"{len(self._chosen)} variational parameter tensors"

    # --- state

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; while another thread runs the network with drawn weights, it waits."""
        self._hold_pruned()
        with self._turns.reading():
            return super().state_dict(*args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; while another thread runs the network with drawn weights, it waits."""
        with self._turns.reading():
            super().zero_grad(set_to_none)

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
        self._programs = None

    def fix(self, name: str, mask: Tensor) -> None:
        """Give a parameter the mask `fixed`, `(*shape)`; weights that are `PRUNED` become 0."""
        self.fixed.put_leaf(name, mask.to(torch.int8).to(self.rho.leaf_at(name).device))
        self._hold_pruned()

    @torch.no_grad()
    def _hold_pruned(self) -> None:
        # Draws have them at 0 anyhow; but the means are the network's own, and momentum moves what has no gradient.
        if next(self.fixed.buffers(), None) is not None:
            for q in self._posteriors().values():
                if q.fixed is not None:
                    q.mu[q.fixed == PRUNED] = 0.0

    def train(self, mode: bool = True) -> "VariationalModule":
        """As in torch: `train()` draws the weights, `eval()` uses their means."""
        self._hold_pruned()
        if not self._modes.train_later(self, mode):
            super().train(mode)
        return self

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
        return super().load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VariationalModule":
        self._programs = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # programs are made again when needed, and contexts end with the original
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_turns", "_modes")}
        return {**kept, "_programs": None, "_noise": None, "_seed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._turns, self._modes = Turns(), Modes()

    def __deepcopy__(self, memo: dict[int, Any]) -> "VariationalModule":
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        state = self.__getstate__()
        with self._turns.reading():
            state["_modules"] = {
                name: copy_network(child, memo) for name, child in self._modules.items() if child is not None
            }
        new.__setstate__(copy.deepcopy(state, memo))
        return new


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
