"""Selection of the parameters to make variational, with a reason for each that is skipped."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn

from varify.errors import SelectionError, listed
from varify.network.parameters import Slot, first_slots, is_variational

# The type of `where` in `variationalize`: a glob on names, several, a predicate (name, parameter, owner), or None.
WhereLike = str | Sequence[str] | Callable[[str, nn.Parameter, nn.Module], bool] | None
T = TypeVar("T")
ON_META = "on the meta device"
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# "Norm" as a word of a class name in CamelCase or snake_case, or after "layer", "batch", ...: not "Abnormality".
_NORM_WORD = re.compile(
    r"(?:Norm|(?<![a-z])norm|(?i:(?:batch|layer|group|instance|rms)norm))(?:ali[sz](?:ation|er)|s)?(?![a-z])"
)


def matches(name: str, pattern: str | Sequence[str]) -> bool:
    """Whether a glob, or any of several, matches a parameter name."""
    return any(fnmatchcase(name, glob) for glob in ([pattern] if isinstance(pattern, str) else pattern))


def by_glob(setting: object, default: T, names: Iterable[str], known: Callable[[Any], T]) -> dict[str, T]:
    """Settings by name, from one setting for all or from `{glob: setting}`; the last match wins, `default` elsewhere.

    Raises:
        SelectionError: a glob matches nothing.
    """
    names = list(names)
    if not isinstance(setting, Mapping):
        return dict.fromkeys(names, known(setting))
    chosen = dict.fromkeys(names, default)
    for glob, value in setting.items():
        matched = matching(names, glob, "the glob ")
        chosen.update(dict.fromkeys(matched, known(value)))
    return chosen


def matching(names: Iterable[str], where: str | Sequence[str], argument: str = "where=") -> list[str]:
    """The names that `where` matches.

    Raises:
        SelectionError: a glob matches no name.
    """
    names = list(names)
    for glob in [where] if isinstance(where, str) else where:
        if not any(matches(name, glob) for name in names):
            raise SelectionError(
                f"{argument}{glob!r} matches no parameter; there are {listed(names)}{_layer_hint(glob, names)}"
            )
    matched = [name for name in names if matches(name, where)]
    if not matched:
        raise SelectionError(f"{argument}{where!r} matches no parameter; there are {listed(names)}")
    return matched


def _layer_hint(glob: Any, names: Iterable[str]) -> str:
    """A hint if `glob` is the name of a layer and not of a parameter."""
    return f"; for the layer, write {glob + '.*'!r}" if any(n.startswith(f"{glob}.") for n in names) else ""


def choose(network: nn.Module, where: WhereLike) -> tuple[dict[str, Slot], dict[str, str]]:
    """The slots to make variational by name, and the reason for each parameter that is skipped.

    Raises:
        SelectionError: no parameter is selected.
    """
    chosen: dict[str, Slot] = {}
    skipped: dict[str, str] = {}
    everything = first_slots(network)
    _check_where(where, everything)
    inside = {id(p) for m in network.modules() if is_variational(m) for p in m.parameters()}
    for name, slot in everything.items():
        why_not = "variational already" if id(slot.parameter) in inside else _impossible(slot)
        if why_not is None:
            why_not = _default_exclusion(slot) if where is None else _not_selected(slot, where)
        if why_not is None:
            chosen[name] = slot
        else:
            skipped[name] = why_not
    if not chosen:
        raise SelectionError(_nothing_chosen(where, skipped))
    return chosen, skipped


def _check_where(where: object, names: Iterable[str]) -> None:
    if where is None or isinstance(where, str) or (callable(where) and not isinstance(where, nn.Module)):
        return
    if not isinstance(where, (list, tuple, set)) or not all(isinstance(glob, str) for glob in where):
        options = "a glob on parameter names, several, or a predicate (name, parameter, owner_module)"
        raise SelectionError(f"where must be {options}, got {where!r}")
    if where:
        matching(names, list(where))


def padding_rows(network: nn.Module, chosen: Mapping[str, Slot]) -> dict[str, torch.Tensor]:
    """Masks, 1 at the padding row, of embeddings that have one: that row gets no gradient, so it is not random.

    An embedding that is tied to a layer of another kind gets none: there, the row is a weight like any other.
    """
    owners: dict[int, list[nn.Module]] = {}
    for module in network.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(module)
    masks = {}
    for name, slot in chosen.items():
        rows = {_padding_row(owner) for owner in owners[id(slot.parameter)]}
        row = rows.pop()
        if row is not None and not rows:
            masks[name] = torch.zeros(slot.parameter.shape, dtype=torch.int8)
            masks[name][row] = 1
    return masks


def _padding_row(module: nn.Module) -> int | None:
    return module.padding_idx if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else None


def _impossible(slot: Slot) -> str | None:
    parameter = slot.parameter
    if isinstance(slot.owner, torch.jit.ScriptModule):
        return "TorchScript"
    if getattr(slot.owner, "sparse", False) is True:
        return "sparse gradients"
    if parameter.is_meta:
        return ON_META
    if parameter.layout is not torch.strided:
        return "sparse"
    if parameter.is_complex():
        return "complex"
    if not parameter.is_floating_point():
        return "integer"
    if torch.finfo(parameter.dtype).bits < 16:
        return f"of type {parameter.dtype}"
    return None


def _default_exclusion(slot: Slot) -> str | None:
    if not slot.parameter.requires_grad:
        return "frozen"
    return "normalization layer" if _scales_or_shifts(slot) else None


def _scales_or_shifts(slot: Slot) -> bool:
    """Whether it is the scale or shift of a normalization layer."""
    # those of torch's layers may have several dimensions, as in LayerNorm([C, H, W])
    if isinstance(slot.owner, _NORMS) and slot.attr in ("weight", "bias"):
        return True
    # a layer recognized by its class name may do more than normalize, and its matrices are weights like any other
    return slot.parameter.dim() < 2 and is_normalization(slot.owner)


def is_normalization(module: nn.Module) -> bool:
    """Whether it is a torch normalization layer, or named like one (`LlamaRMSNorm`, `BatchNormAct2d`)."""
    return isinstance(module, _NORMS) or _NORM_WORD.search(type(module).__name__) is not None


def _not_selected(slot: Slot, where: Any) -> str | None:
    selected = where(slot.name, slot.parameter, slot.owner) if callable(where) else matches(slot.name, where)
    return None if selected else "not chosen"


def _nothing_chosen(where: WhereLike, skipped: dict[str, str]) -> str:
    if not skipped:
        return "the model has no parameters, so there is nothing to make variational"
    if set(skipped.values()) & {ON_META} and set(skipped.values()) <= {ON_META, "not chosen"}:
        return "the parameters are on the meta device: load them or call to_empty(device=...) first, then convert"
    reasons = listed(f"{name} ({why})" for name, why in skipped.items())
    if where is None:
        return f"no parameter can be made variational by default; say where=... to choose from {reasons}"
    hint = _layer_hint(where, skipped) if isinstance(where, str) else ""
    return f"where={where!r} matches no parameter that can be variational; this model has {reasons}{hint}"
