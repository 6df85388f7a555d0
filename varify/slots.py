"""The chosen parameters of one network: where they are, and views of it with others in their places."""

from collections.abc import Mapping
from operator import is_
from typing import Any

from torch import nn

from varify.graph.plans import Plan
from varify.network.parameters import Site
from varify.network.sharding import whole
from varify.network.tree import Tree
from varify.network.view import Views
from varify.weights.posterior import GaussianPosterior


class Slots:
    """Holds as long as the network has the same modules, with tied weights still tied; see `fits`.

    Args:
        network: the live one.
        sites: see below.
        rho: by the sites' names, as are `prior` and `fixed`; see `VariationalModule`.
        prior: likewise.
        fixed: likewise, of some of them.

    Attributes:
        sites: of the chosen parameters, by name.
        views: to run the network with other weights, as itself: what forward sets is set in the network.
        apart: likewise, but what forward sets is forgotten.
        sequential: kinds of calls whose draws were found not to run vectorized.
        vectorized: kinds of calls that were seen to keep nothing, and to return the same vectorized and by themselves.
        plans: of calls with estimators, by their kind.
    """

    def __init__(self, network: nn.Module, sites: Mapping[str, Site], rho: Tree, prior: Tree, fixed: Tree) -> None:
        self.network, self.sites = network, sites
        self._fixed = fixed
        # where the parts of each posterior are: to look names up anew takes longer than many a network's own layers
        self._places: list[tuple[str, dict[str, Any], str, dict[str, Any], str, dict[str, Any]]] = [
            (name, site.owner._parameters, site.attr, *rho.place_of(name), prior.place_of(name)[0])
            for name, site in sites.items()
        ]
        self._children = [(module._modules, list(module._modules.values())) for module in network.modules()]
        first = {id(site.parameter): site for site in sites.values()}
        self._tied = [
            (module._parameters, attr, first[id(p)])
            for module in network.modules()
            for attr, p in module._parameters.items()
            if id(p) in first and module._parameters is not first[id(p)].owner._parameters
        ]
        self.views = Views(network, sites, whole=False)
        self.apart = Views(network, sites, whole=True)
        self.sequential: set[Any] = set()
        self.vectorized: set[Any] = set()
        self.plans: dict[Any, Plan] = {}

    def fits(self, network: nn.Module) -> bool:
        """Whether `network` is the one these were made for, and as it was."""
        return (
            self.network is network
            and all(len(t) == len(was) and all(map(is_, t.values(), was)) for t, was in self._children if t or was)
            and all(table.get(attr) is site.owner._parameters.get(site.attr) for table, attr, site in self._tied)
        )

    def posteriors(self) -> dict[str, GaussianPosterior]:
        """The posteriors of the moment, by name."""
        fixed = self._fixed.leaf_at if self._fixed._modules or self._fixed._buffers else _none
        return {
            name: GaussianPosterior(whole(means[attr]), whole(rhos[leaf]), priors[leaf], fixed(name))
            for name, means, attr, rhos, leaf, priors in self._places
        }


def _none(name: str) -> None:
    return None
