"""Parameters of a network: each distinct tensor once, with its slots and its names."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from varify.errors import StructureError


class Slot(NamedTuple):
    """A parameter slot: `owner._parameters[attr]`, named `name` from the network's root.

    The slot and not the tensor identifies a parameter, since `.to()` or `assign=True` may replace the tensor.
    """

    name: str
    owner: nn.Module
    attr: str

    @property
    def parameter(self) -> nn.Parameter:
        """The tensor that is in the slot now."""
        parameter = self.owner._parameters[self.attr]
        assert parameter is not None
        return parameter

    @property
    def fan_in(self) -> int:
        """Product of all dimensions but the first; for a vector or scalar, the fan-in of its layer's weight matrix."""
        weight: nn.Parameter | None = self.parameter
        if weight is not None and weight.dim() < 2:
            weight = _matrix_beside(self)
        return 1 if weight is None else weight[0].numel() if len(weight) else 1


def _matrix_beside(slot: Slot) -> nn.Parameter | None:
    """The matrix in the same layer: `weight_ih_l0` for `bias_ih_l0`, else the first of two or more dimensions."""
    own = slot.owner._parameters
    parametrized = getattr(slot.owner, "parametrizations", None)
    inner = list(parametrized.parameters()) if isinstance(parametrized, nn.ModuleDict) else []
    beside = [own.get(slot.attr.replace("bias", "weight")), *own.values(), *inner]
    return next((p for p in beside if p is not None and p.dim() >= 2), None)


def first_slots(network: nn.Module) -> dict[str, Slot]:
    """The first slot of every distinct parameter, by name."""
    found: dict[int, Slot] = {}
    for path, module in network.named_modules():
        for attr, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), Slot(f"{path}.{attr}" if path else attr, module, attr))
    return {slot.name: slot for slot in found.values()}


def alias_names(network: nn.Module) -> dict[str, str]:
    """The first name of a parameter by each of its names, the first one included."""
    first = {id(slot.parameter): name for name, slot in first_slots(network).items()}
    return {name: first[id(p)] for name, p in network.named_parameters(remove_duplicate=False)}


def slot_names(network: nn.Module) -> dict[str, str]:
    """The first name of the parameter in each slot. A shared module counts once; a tied weight has two slots."""
    first = {id(slot.parameter): name for name, slot in first_slots(network).items()}
    return {
        f"{path}.{attr}" if path else attr: first[id(parameter)]
        for path, module in network.named_modules()
        for attr, parameter in module._parameters.items()
        if parameter is not None
    }


class Variational(nn.Module):
    """What every `VariationalModule` is, known to the code beneath that class."""


def is_variational(module: object) -> bool:
    """Whether it is a `VariationalModule`."""
    return isinstance(module, Variational)


def adapters(network: nn.Module) -> list[Any]:
    """The layers of a network whose adapters can be merged into the weights beneath them, as PEFT's."""
    return [module for module in network.modules() if hasattr(module, "merged_adapters")]


def refuse_merged(layers: Sequence[Any]) -> None:
    """Refuse adapters that are merged.

    Raises:
        StructureError: one is.
    """
    if any(layer.merged_adapters for layer in layers):
        raise StructureError(
            "an adapter in vnet.module is merged into the weights beneath it, so a draw of its own would change "
            "nothing; the posterior of the product B·A plus the weight is not Gaussian, so it can't be merged "
            "itself: call vnet.module.unmerge_adapter(), or merge the means, "
            "vnet.mean_model().merge_and_unload(), or a draw, vnet.sample_model().merge_and_unload()"
        )
