"""Which parameters of a network become variational, and why the others don't."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn

from varify.errors import SelectionError, listed
from varify.network.parameters import Site, sites

Where = str | Sequence[str] | Callable[[str, nn.Parameter, nn.Module], bool] | None
T = TypeVar("T")
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# "Norm" as a word of a name in CamelCase or snake_case, or the end of a word such as "Layernorm": not "Abnormality".
_NORM_WORD = re.compile(
    r"(?:Norm|(?<![a-z])norm|(?i:(?:batch|layer|group|instance|rms)norm))(?:ali[sz](?:ation|er)|s)?(?![a-z])"
)


def matches(name: str, pattern: str | Sequence[str]) -> bool:
    """Whether a glob, or one of several, matches a parameter's name."""
    return any(fnmatchcase(name, glob) for glob in ([pattern] if isinstance(pattern, str) else pattern))


def by_glob(setting: Any, default: T, names: Iterable[str], known: Callable[[Any], T]) -> dict[str, T]:
    """One setting for all names, or `{glob: setting}` with the last match winning and `default` elsewhere.

    Raises:
        SelectionError: a glob matches nothing.
    """
    names = list(names)
    if not isinstance(setting, Mapping):
        return dict.fromkeys(names, known(setting))
    chosen = dict.fromkeys(names, default)
    for glob, value in setting.items():
        matched = matching(names, glob)
        chosen.update(dict.fromkeys(matched, known(value)))
    return chosen


def matching(names: Iterable[str], where: str | Sequence[str]) -> list[str]:
    """The names that `where` matches.

    Raises:
        SelectionError: there is none.
    """
    names = list(names)
    for glob in [where] if isinstance(where, str) else where:
        if not any(matches(name, glob) for name in names):
            raise SelectionError(f"where={glob!r} matches no parameter; there are {listed(names)}{_meant(glob, names)}")
    matched = [name for name in names if matches(name, where)]
    if not matched:
        raise SelectionError(f"where={where!r} matches no parameter; there are {listed(names)}")
    return matched


def _meant(glob: Any, names: Iterable[str]) -> str:
    """A hint for somebody who wrote a layer's name."""
    return f"; for the layer, write {glob + '.*'!r}" if any(n.startswith(f"{glob}.") for n in names) else ""


def choose(network: nn.Module, where: Where) -> tuple[dict[str, Site], dict[str, str]]:
    """The sites to make variational and, for all others, why not.

    Raises:
        SelectionError: nothing is chosen.
    """
    chosen: dict[str, Site] = {}
    skipped: dict[str, str] = {}
    everything = sites(network)
    _check_where(where, everything)
    inside = {id(p) for m in network.modules() if hasattr(type(m), "state_of_a_copy") for p in m.parameters()}
    for name, site in everything.items():
        why_not = "variational already" if id(site.parameter) in inside else _impossible(site)
        if why_not is None:
            why_not = _default_exclusion(site) if where is None else _not_asked_for(site, where)
        if why_not is None:
            chosen[name] = site
        else:
            skipped[name] = why_not
    if not chosen:
        raise SelectionError(_nothing_chosen(where, skipped))
    return chosen, skipped


def _check_where(where: Any, names: Iterable[str]) -> None:
    if where is None or isinstance(where, str) or (callable(where) and not isinstance(where, nn.Module)):
        return
    if not isinstance(where, (list, tuple, set)) or not all(isinstance(glob, str) for glob in where):
        needed = "a glob on parameter names, several, or a predicate (name, parameter, owner_module) is needed"
        raise SelectionError(f"where={where!r}: {needed}")
    if where:
        matching(names, list(where))


def padding_rows(network: nn.Module, chosen: Mapping[str, Site]) -> dict[str, torch.Tensor]:
    """Masks, 1 at the padding row, of the embeddings that have one: it stands for no input and gets no gradient.

    Not of those that are tied to a layer of another kind, to which the row is one as any other.
    """
    owners: dict[int, list[nn.Module]] = {}
    for module in network.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(module)
    masks = {}
    for name, site in chosen.items():
        rows = {_padding_row(owner) for owner in owners[id(site.parameter)]}
        row = rows.pop()
        if row is not None and not rows:
            masks[name] = torch.zeros(site.parameter.shape, dtype=torch.int8)
            masks[name][row] = 1
    return masks


def _padding_row(module: nn.Module) -> int | None:
    return module.padding_idx if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else None


def _impossible(site: Site) -> str | None:
    parameter = site.parameter
    if isinstance(site.owner, torch.jit.ScriptModule):
        return "TorchScript"
    if getattr(site.owner, "sparse", False) is True:
        return "sparse gradients"
    if parameter.is_meta:
        return "on the meta device"
    if parameter.layout is not torch.strided:
        return "sparse"
    if parameter.is_complex():
        return "complex"
    if not parameter.is_floating_point():
        return "integer"
    if torch.finfo(parameter.dtype).bits < 16:
        return f"of type {parameter.dtype}"
    return None


def _default_exclusion(site: Site) -> str | None:
    if not site.parameter.requires_grad:
        return "frozen"
    return "normalisation layer" if _scales_or_shifts(site) else None


def _scales_or_shifts(site: Site) -> bool:
    """Whether a normalization layer scales or shifts by this parameter."""
    # torch's own may do so over several dimensions, as LayerNorm([C, H, W]) does
    if isinstance(site.owner, _NORMS) and site.attr in ("weight", "bias"):
        return True
    # what is known by its name alone may be a layer that normalizes and does more, with matrices of its own
    return site.parameter.dim() < 2 and is_normalisation(site.owner)


def is_normalisation(module: nn.Module) -> bool:
    """Torch's normalization layers, and others' by a word of their name (`LlamaRMSNorm`, `BatchNormAct2d`, ...)."""
    return isinstance(module, _NORMS) or _NORM_WORD.search(type(module).__name__) is not None


def _not_asked_for(site: Site, where: Any) -> str | None:
    asked_for = where(site.name, site.parameter, site.owner) if callable(where) else matches(site.name, where)
    return None if asked_for else "not chosen"


def _nothing_chosen(where: Where, skipped: dict[str, str]) -> str:
    if not skipped:
        return "the model has no parameters, so there is nothing to make variational"
    told = listed(f"{name} ({why})" for name, why in skipped.items())
    if where is None:
        return f"no parameter can be made variational by default; say where=... to choose from {told}"
    hint = _meant(where, skipped) if isinstance(where, str) else ""
    return f"where={where!r} matches no parameter that can be variational; this model has {told}{hint}"
