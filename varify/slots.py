"""The chosen parameters of one network: where they are, and views of it with others in their places."""

from collections.abc import Mapping
from operator import is_
from typing import Any

from torch import Tensor, nn

from varify.graph.plans import Plan
from varify.selection import Site
from varify.view import Views


class Slots:
    """Holds as long as the network has the same modules, with tied weights still tied; see `fits`.

    Attributes:
        sites: of the chosen parameters, by name.
        views: to run the network with other weights, as itself: what forward sets is set in the network.
        apart: likewise, but what forward sets is forgotten.
        sequential: kinds of calls whose draws were found not to run vectorized.
        vectorized: kinds of calls that were seen to keep nothing, and to return the same vectorized and by themselves.
        plans: of calls with estimators, by their kind.
    """

    def __init__(self, network: nn.Module, sites: Mapping[str, Site]) -> None:
        self.network, self.sites = network, sites
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

    def means(self) -> dict[str, Tensor]:
        """The parameters, by name."""
        return {name: site.parameter for name, site in self.sites.items()}
