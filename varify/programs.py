"""The programs of one network, by kind of call: made when first needed, then kept."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from varify.calls import Attributes, Layout, Unkeyable, autocast_state, mode_of, take_apart
from varify.errors import EstimatorError
from varify.rewriting import Program, rewrite
from varify.selection import Site
from varify.tracing import opaque_trace, trace

# A call whose constants change all the time (a step counter, a temperature) would fill the memory; beyond this many
# programs the network runs as one opaque node, which serves every call.
MOST_PROGRAMS = 64


class Programs:
    """Holds good as long as the network has the same modules; see `fits`."""

    def __init__(self, network: nn.Module, sites: Mapping[str, Site]) -> None:
        self.sites = sites
        self.made: dict[Any, Program] = {}
        self._network = network
        self._modules = tuple(network.modules())
        first = {id(site.parameter): site for site in sites.values()}
        self._tied = [
            (module._parameters, attr, first[id(p)])
            for module in self._modules
            for attr, p in module._parameters.items()
            if id(p) in first and module is not first[id(p)].owner
        ]
        self._attributes = Attributes(self._modules)

    def fits(self, network: nn.Module) -> bool:
        """Whether `network` still has the modules these were made for, with tied weights still tied."""
        return self._modules == tuple(network.modules()) and all(
            table.get(attr) is site.owner._parameters.get(site.attr) for table, attr, site in self._tied
        )

    def find(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: Mapping[str, str], strict: bool
    ) -> tuple[Program, list[Any]]:
        """The program for a call, and what to run it on.

        Args:
            args: of the call, as are `kwargs`.
            kwargs: likewise.
            wanted: estimator by parameter; those without one are drawn.
            strict: see `rewrite`.
        """
        try:
            layout, tensors = take_apart(args, kwargs)
        except Unkeyable as error:
            return self._for_any_call(str(error), args, kwargs, wanted, strict)
        hooked = bool(nn.modules.module._has_any_global_hook())
        state = (mode_of(self._modules), self._attributes.key(), hooked, autocast_state())
        key = (layout.key, state, bool(wanted))
        shaped = (key, tuple(t.shape for t in tensors))
        program = self.made.get(key) or self.made.get(shaped)
        if program is None and len(self.made) >= MOST_PROGRAMS:
            return self._for_any_call(f"more than {MOST_PROGRAMS} kinds of calls", args, kwargs, wanted, strict)
        if program is None:
            program = self._make(layout, tensors, wanted, strict)
            self.made[shaped if program.needs_shapes else key] = program
        return program, tensors

    def _make(self, layout: Layout, tensors: list[Any], wanted: Mapping[str, str], strict: bool) -> Program:
        try:
            return rewrite(trace(self._network, layout, tensors, self.sites), self.sites, wanted, strict)
        except EstimatorError:
            raise
        except Exception as error:  # a graph that can be recorded but not written down
            why = f"{type(error).__name__}: {error}"
            return rewrite(opaque_trace(layout, self.sites, why), self.sites, wanted, strict)

    def _for_any_call(
        self, why: str, args: Any, kwargs: Any, wanted: Mapping[str, str], strict: bool
    ) -> tuple[Program, list[Any]]:
        """The network as one opaque node, which takes any arguments whatever."""
        key = (why, bool(wanted))
        if key not in self.made:
            self.made[key] = rewrite(opaque_trace(None, self.sites, why), self.sites, wanted, strict)
        return self.made[key], [args, dict(kwargs)]
