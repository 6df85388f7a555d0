"""Every distinct parameter of a network, its slots and its names."""

from typing import NamedTuple

from torch import nn


class Site(NamedTuple):
    """Where a parameter lives: `owner._parameters[attr]`, called `name` from the network's root."""

    name: str
    owner: nn.Module
    attr: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now."""
        parameter = self.owner._parameters[self.attr]
        assert parameter is not None
        return parameter

    @property
    def fan_in(self) -> int:
        """Product of all dimensions but the first; for a parameter of fewer than two, that of its layer's weight."""
        weight: nn.Parameter | None = self.parameter
        if weight is not None and weight.dim() < 2:
            weight = _matrix_beside(self)
        return 1 if weight is None else weight[0].numel() if len(weight) else 1


def _matrix_beside(site: Site) -> nn.Parameter | None:
    """The tensor of two or more dimensions that `site` belongs to: `weight_ih_l0` for `bias_ih_l0`, else the first."""
    own = site.owner._parameters
    parametrized = getattr(site.owner, "parametrizations", None)
    inner = list(parametrized.parameters()) if isinstance(parametrized, nn.ModuleDict) else []
    beside = [own.get(site.attr.replace("bias", "weight")), *own.values(), *inner]
    return next((p for p in beside if p is not None and p.dim() >= 2), None)


def sites(network: nn.Module) -> dict[str, Site]:
    """Every distinct parameter under its first name."""
    found: dict[int, Site] = {}
    for path, module in network.named_modules():
        for attr, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), Site(f"{path}.{attr}" if path else attr, module, attr))
    return {site.name: site for site in found.values()}


def aliases(network: nn.Module) -> dict[str, str]:
    """First name of the parameter by each name it has, its first one too."""
    first = {id(site.parameter): name for name, site in sites(network).items()}
    return {name: first[id(p)] for name, p in network.named_parameters(remove_duplicate=False)}


def places(network: nn.Module) -> dict[str, str]:
    """First name of the parameter at each place that holds one: a shared module is one place, a tied weight two."""
    first = {id(site.parameter): name for name, site in sites(network).items()}
    return {
        f"{path}.{attr}" if path else attr: first[id(parameter)]
        for path, module in network.named_modules()
        for attr, parameter in module._parameters.items()
        if parameter is not None
    }
