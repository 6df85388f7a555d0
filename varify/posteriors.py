"""The store: every posterior of a network, paired once with its parameter, and what is asked of all of them."""

from collections.abc import ItemsView, Iterator, Mapping, Sequence, ValuesView
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from varify.errors import ArgumentError, PriorError, StructureError, UnknownNameError, listed
from varify.network.parameters import Slot, adapters, alias_names, first_slots, refuse_merged, slot_names
from varify.network.selection import matching
from varify.network.sharding import whole
from varify.network.tree import Tree
from varify.priors.registry import PriorLike, as_prior
from varify.priors.total_kl import total_kl
from varify.weights.draw import Drawing, draw
from varify.weights.posterior import PRUNED, GaussianPosterior, cast
from varify.weights.prior import Prior


@dataclass
class Settings:
    """What a conversion was asked for, and what it found.

    Attributes:
        names: of the variational parameters, in order.
        slots: first name of the parameter in each slot of the network; see `slot_names`.
        skipped: by deterministic parameter, why it is that.
        estimators: by variational parameter.
        strict: whether an estimator that is unavailable for a parameter is an error.
        batch_dim: dimension of the network's inputs that counts examples.
    """

    names: list[str]
    slots: dict[str, str]
    skipped: dict[str, str]
    estimators: dict[str, str]
    strict: bool
    batch_dim: int

    @property
    def wants_estimators(self) -> bool:
        """Whether any parameter has an estimator other than drawn weights."""
        return set(self.estimators.values()) != {"weights"}


class Trees(NamedTuple):
    """Beside the network, under its parameters' names: what `VariationalModule` has in its state dict."""

    rho: Tree
    prior: Tree
    fixed: Tree

    @classmethod
    def of(cls, rhos: Mapping[str, nn.Parameter], priors: Mapping[str, Prior]) -> "Trees":
        """New ones, without masks."""
        trees = cls(Tree(), Tree(), Tree())
        for name, rho in rhos.items():
            trees.rho.put_leaf(name, rho)
            trees.prior.put_leaf(name, priors[name])
        return trees


_CHANGED = "of vnet.module was deleted, or has another shape, after the conversion"


class _Tables(NamedTuple):
    """Where the parts of one posterior are, to be looked up without walking a path of names."""

    means: Mapping[str, Any]
    attr: str
    rhos: Mapping[str, Any]
    leaf: str
    priors: Mapping[str, Any]
    masks: Mapping[str, Any]

    def pair(self) -> GaussianPosterior:
        mu, rho = self.means[self.attr], self.rhos[self.leaf]
        if mu is None or mu.shape != rho.shape:
            raise StructureError(f"the parameter {self.attr!r} {_CHANGED}")
        return GaussianPosterior(whole(mu), whole(rho), self.priors[self.leaf], self.masks.get(self.leaf))

    def holds(self, q: GaussianPosterior) -> bool:
        same = q.mu is self.means[self.attr] and q.rho is self.rhos[self.leaf]
        return same and q.prior is self.priors[self.leaf] and q.fixed is self.masks.get(self.leaf)


class Posteriors(Mapping[str, GaussianPosterior]):
    """Posterior by parameter name; iterates over first names, finds alias names too.

    Parameters are known by their slots and not by themselves, since `.to()` and `load_state_dict(assign=True)` may
    put others in. It holds as long as the network has the same modules, with tied weights still tied; see `fits`.

    Args:
        network: the live one.
        trees: beside it.
        settings: of the conversion.

    Attributes:
        network: as given, as are `trees` and `settings`.
        slots: of the variational parameters, by name.

    Raises:
        StructureError: a variational parameter is not there any more, or is tied otherwise than at conversion.
    """

    def __init__(self, network: nn.Module, trees: Trees, settings: Settings) -> None:
        self.network, self.trees, self.settings = network, trees, settings
        self.slots = self._found_slots()
        self._pairs: dict[str, GaussianPosterior] | None = None
        self._look_up()
        self._children = [(module._modules, list(module._modules.values())) for module in network.modules()]
        self._adapted = adapters(network)
        first = {id(slot.parameter): slot for slot in self.slots.values()}
        self._tied = [
            (module._parameters, attr, first[id(p)])
            for module in network.modules()
            for attr, p in module._parameters.items()
            if id(p) in first and module._parameters is not first[id(p)].owner._parameters
        ]

    def _found_slots(self) -> dict[str, Slot]:
        everything, names, now = first_slots(self.network), self.settings.names, slot_names(self.network)
        shapes = {name: self.trees.rho.leaf_at(name).shape for name in names}
        lost = [n for n in names if n not in everything or everything[n].parameter.shape != shapes[n]]
        lost += [slot for slot, name in self.settings.slots.items() if now.get(slot, name) != name]
        if lost:
            raise StructureError(
                f"{listed(lost)} of vnet.module changed since the conversion, and so has no posterior; "
                "change the plain network first, then convert it"
            )
        return {name: everything[name] for name in names}

    def _look_up(self) -> None:
        rho, prior, fixed = self.trees
        self._tables = [
            _Tables(
                *(slot.owner._parameters, slot.attr),
                *rho.place_of(name),
                *(prior.place_of(name)[0], fixed.place_of(name)[0]),
            )
            for name, slot in self.slots.items()
        ]

    def fits(self, network: nn.Module) -> bool:
        """Whether `network` is the one that these are of, and as it was."""
        return (
            self.network is network
            and all(len(t) == len(was) and all(map(is_, t.values(), was)) for t, was in self._children if t or was)
            and all(table.get(attr) is slot.owner._parameters.get(slot.attr) for table, attr, slot in self._tied)
        )

    def now(self) -> dict[str, GaussianPosterior]:
        """The posteriors by first name: those of before, where no tensor and no prior was replaced.

        Raises:
            StructureError: a parameter was deleted, has another shape, was tied to another one, or is of an adapter
                that was merged.
        """
        refuse_merged(self._adapted)
        pairs = self._pairs
        try:
            if pairs is None or not all(t.holds(q) for t, q in zip(self._tables, pairs.values(), strict=True)):
                # in two steps, since other threads read it
                pairs = {name: tables.pair() for name, tables in zip(self.slots, self._tables, strict=True)}
                if len({id(q.mu) for q in pairs.values()}) < len(pairs):
                    raise StructureError("parameters of vnet.module were tied after the conversion; tie them before it")
                self._pairs = pairs
        except KeyError as error:
            raise StructureError(f"the parameter {error} {_CHANGED}") from None
        return pairs

    # --- a mapping

    def __getitem__(self, name: str) -> GaussianPosterior:
        first = self._aliases.get(name, name)
        if first not in self.slots:
            raise UnknownNameError(f"{name!r} has no posterior; there are {listed(self.slots)}")
        return self.now()[first]

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def values(self) -> ValuesView[GaussianPosterior]:
        """Those of `now`; a Mapping's own would ask for each by name, which checks all of them."""
        return self.now().values()

    def items(self) -> ItemsView[str, GaussianPosterior]:
        """Likewise."""
        return self.now().items()

    def __len__(self) -> int:
        return len(self.slots)

    def __repr__(self) -> str:
        return f"Posteriors({listed(self.slots)})"

    @cached_property
    def _aliases(self) -> dict[str, str]:
        return alias_names(self.network)

    # --- draws and divergences

    def draw(self, noise: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """theta, a draw of every parameter by name; see `varify.weights.draw.draw`."""
        return draw(self.now(), noise)

    def masked_means(self) -> dict[str, Tensor]:
        """Of pruned parameters by name, each in its network's dtype; all others have mu for their mean."""
        return {name: cast(q.mean, q.mu.dtype) for name, q in self.masked().items() if q.mask_has.pruned}

    def masked(self) -> dict[str, GaussianPosterior]:
        """Those that have a mask: their means may be other than mu, which an optimizer's momentum can move."""
        if self.trees.fixed.is_empty:
            return {}
        return {name: q for name, q in self.now().items() if q.fixed is not None}

    def check_noise(self, noise: Mapping[str, Tensor]) -> None:
        """Refuse noise that is not of these parameters.

        Raises:
            ArgumentError: an unknown name, or another shape than the parameter's.
        """
        shapes = {name: tuple(slot.parameter.shape) for name, slot in self.slots.items()}
        for name, eps in noise.items():
            if name not in shapes:
                raise ArgumentError(f"noise must be by parameter name, got {name!r}; there are {listed(shapes)}")
            if tuple(eps.shape) != shapes[name]:
                raise ArgumentError(f"noise of {name} must have shape {shapes[name]}, got {tuple(eps.shape)}")

    def kl_divergence(self, drawing: Drawing) -> dict[str, Tensor]:
        """KL(q‖p) by parameter name, each a scalar `()`, nats, differentiable."""
        posteriors = self.now()
        with drawing.same_numbers(cuda_devices(posteriors)):
            return {name: drawing.counted(q.kl_divergence()) for name, q in posteriors.items()}

    def total_kl(self, drawing: Drawing) -> list[Tensor]:
        """Scalars `()` whose sum is that of `kl_divergence`, made with fewer passes over the weights."""
        posteriors = self.now()
        with drawing.same_numbers(cuda_devices(posteriors)):
            return [drawing.counted(kl) for kl in total_kl(posteriors.values())]

    @contextmanager
    def sharing_sigma(self) -> Iterator[None]:
        """Within, sigma is computed once, for draws and divergences alike, as long as rho stays as it is.

        A scope and no cache: outside of it a tensor's numbers may change without a trace in its version.
        """
        posteriors = list(self.now().values())
        for q in posteriors:
            q.shared = []
        try:
            yield
        finally:
            for q in posteriors:
                q.shared = None

    # --- priors, masks, settings

    def set_prior(self, prior: PriorLike, where: str | Sequence[str], **hyperparameters: object) -> None:
        """Give the parameters that `where` matches another prior, all or none; see `VariationalModule.set_prior`."""
        new = as_prior(prior, **hyperparameters)
        names = matching([name for name, first in self._aliases.items() if first in self.slots], where)
        bound = {self._aliases[name]: bind(new, self.slots[self._aliases[name]]) for name in names}
        self.put_priors(bound)

    def put_priors(self, bound: Mapping[str, Prior]) -> None:
        """Set priors that are those of their parameters already, by first name."""
        for name, prior in bound.items():
            self.trees.prior.put_leaf(name, prior)

    @torch.no_grad()
    def set_mask(self, name: str, mask: Tensor) -> None:
        """Give a parameter the mask of its fixed weights, `(*shape)`; weights that are `PRUNED` become 0."""
        mask = mask.to(torch.int8).to(self.trees.rho.leaf_at(name).device)
        self.trees.fixed.put_leaf(name, mask)
        self.slots[name].parameter.masked_fill_(mask == PRUNED, 0.0)
        self._look_up()

    def clear_masks(self) -> None:
        """Let no weight be fixed."""
        self.trees.fixed.clear()
        self._look_up()


def bind(prior: Prior, slot: Slot) -> Prior:
    """`prior` made that of the parameter in `slot`; an error names the parameter."""
    try:
        return prior.for_parameter(slot.parameter.detach(), slot.fan_in)
    except PriorError as error:
        raise PriorError(f"{slot.name}: {error}") from None


def cuda_devices(posteriors: Mapping[str, GaussianPosterior]) -> list[int]:
    """Of the parameters, for `torch.random.fork_rng`."""
    return sorted({q.rho.device.index for q in posteriors.values() if q.rho.is_cuda})
