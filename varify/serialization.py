"""Variational modules in safetensors files: tensors and plain text, nothing that is unpickled."""

import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varify.errors import (
    FileError,
    MissingFileError,
    ModelError,
    PriorError,
    StructureError,
    UnsavableError,
    VarifyError,
    listed,
    one_of,
)
from varify.file_settings import read_settings
from varify.module import VariationalModule
from varify.network.checks import check_model
from varify.network.parameters import alias_names, first_slots
from varify.network.sharding import refuse_sharded
from varify.prediction.ensemble import Ensemble
from varify.state import is_plain, read_extra_state
from varify.variationalize import variationalize
from varify.within import refuse_nested

FORMAT = "1"
EXTRA = "_extra_state"  # torch's key for it


def save(vnet: VariationalModule | Ensemble, path: str | os.PathLike[str], *, only: str | None = None) -> None:
    """Write means, rho's, buffers, priors and settings to a safetensors file; needs the package `safetensors`.

    The file is there whole or not at all; one that was there is replaced. The network's code is not in it.

    Args:
        vnet: on any device. Of an `Ensemble`, its posterior and its seeds: `load_ensemble` draws the same networks.
        path: of the file, by convention `*.safetensors`.
        only: "variational" leaves out what is deterministic; "trained" leaves out what is deterministic and requires
            no gradient, such as the frozen base of an adapter, and buffers. `load` takes the rest from the network
            that it is given, which must have the same base. None: everything.

    Raises:
        ArgumentError: an unknown `only`, or a variational module within, whose parts can't be told.
        MissingFileError: the folder is not there.
        ModelError: vnet is not variational.
        UnsavableError: a module's extra state is neither a tensor nor a plain value, or a tensor is sparse or of a
            type that such files don't know.
        PriorError: a prior has settings of which `load` could not make it again.
    """
    vnet, seeds = (vnet.vnet, vnet.seeds) if isinstance(vnet, Ensemble) else (vnet, None)
    vnet = getattr(vnet, "_orig_mod", vnet)  # of torch.compile
    if not isinstance(vnet, VariationalModule):
        raise ModelError(f"vnet must be a variational module, got a {type(vnet).__name__}; see varify.variationalize")
    refuse_sharded(vnet, "varify.save")
    _check_priors(vnet)
    state = vnet.state_dict() if only is None else _part_of_state(vnet, only)
    for prefix, module in vnet.named_modules():
        if isinstance(module, VariationalModule):  # as text, so that the file can be read without varify
            key = f"{prefix}.{EXTRA}" if prefix else EXTRA
            state[key] = read_extra_state(state[key])
    tensors, plain, same = _parted(state)
    chosen = vnet.posteriors.settings
    settings = {
        "network": type(vnet.module).__name__,
        "parameters": chosen.names,
        "skipped": chosen.skipped,
        "requires_grad": {name: p.requires_grad for name, p in vnet.named_parameters()},
        "versions": getattr(state, "_metadata", {}),  # of modules, by which torch migrates old checkpoints
        "strict": chosen.strict,
        "batch_dim": chosen.batch_dim,
        "extra": plain,
        "same": same,
        "only": only,
        "seeds": seeds,
    }
    metadata = {"format": "pt", "varify": FORMAT, "settings": json.dumps(settings)}
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise MissingFileError(f"{path} is a folder" if path.is_dir() else f"there is no folder {path.parent}")
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        library().torch.save_file(tensors, part, metadata)
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def load(path: str | os.PathLike[str], model: nn.Module) -> VariationalModule:
    """A variational copy of `model` with what `save` wrote; needs the package `safetensors`.

    Args:
        path: of the file.
        model: a plain network like the one converted, with any weights, on the device that is wanted. Not changed. What
            a file of `save(only=...)` lacks is taken from it: give it the weights of the base.

    Raises:
        FileError: the file was not written by `save`.
        StructureError: the model has other parameters or buffers than the one in the file, by name or shape. What it
            does with them can't be checked. Or the settings in the file are none that `save` writes.
        ModelError: the model is no plain network.
        PriorError: a custom prior is unknown (import the module that defines it), or its settings can't be.
        EstimatorError: an estimator is unknown.
    """
    check_model(model)
    files = library()
    if not Path(path).is_file():
        raise MissingFileError(f"there is no file {path}")
    try:
        opened = files.safe_open(path, framework="pt")
    except files.SafetensorError as error:
        raise FileError(f"{path} is no safetensors file, or not whole ({error}); is it of torch.save?") from None
    with opened as file:
        metadata = file.metadata() or {}
        if "varify" not in metadata:
            raise FileError(
                f"{path} was not written by varify.save; a checkpoint of the plain network is loaded as the means, "
                "by vnet.module.load_state_dict(safetensors.torch.load_file(path))"
            )
        if metadata["varify"] != FORMAT:
            raise FileError(f"{path} has format {metadata['varify']} of varify's, which this version does not know")
        settings = read_settings(path, metadata, set(file.keys()))
        state = OrderedDict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  # not a dict
    state.update({name: state[first] for name, first in settings["same"].items()} | settings["extra"])
    state._metadata = settings["versions"]  # type: ignore[attr-defined]  # where torch keeps them
    chosen = settings["parameters"]
    _check(model, state, chosen, settings["network"])
    vnet = variationalize(
        model,
        where=lambda name, *_: name in set(chosen),
        strict=settings["strict"],
        batch_dim=settings.get("batch_dim", 0),
    )
    vnet.posteriors.settings.skipped = settings["skipped"]
    if settings.get("only") is not None:
        base = {name: value for name, value in vnet.state_dict().items() if name.startswith("module.")}
        state.update({name: value for name, value in base.items() if name not in state})
    try:
        vnet.load_state_dict(state)
    except VarifyError:
        raise
    except RuntimeError as error:
        raise StructureError(f"{path} is of another network than this {type(model).__name__}: {error}") from None
    for name, parameter in vnet.named_parameters():
        parameter.requires_grad_(settings["requires_grad"].get(name, parameter.requires_grad))
    return vnet


def _part_of_state(vnet: VariationalModule, only: str) -> OrderedDict[str, Any]:
    """The entries of a state dict that `save(only=...)` writes."""
    one_of("only", only, ("variational", "trained"))
    refuse_nested(vnet, f"varify.save(only={only!r})")
    names = set(vnet.posteriors)
    if only == "trained":
        names |= {name for name, p in vnet.module.named_parameters() if p.requires_grad}
    aliases = {alias for alias, first in alias_names(vnet.module).items() if first in names}
    state = vnet.state_dict()
    for key in list(state):
        if key.startswith("module.") and key.removeprefix("module.") not in aliases:
            del state[key]
    return state  # type: ignore[no-any-return]


def library() -> Any:
    """The package `safetensors`."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("varify.save and varify.load need safetensors: pip install safetensors") from error
    return safetensors


def _parted(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """The tensors, each distinct one once; what else there is; and the other names of tensors."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    same: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            plain[name] = _checked(name, value)
            continue
        _check_tensor(name, value)
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and place in seen:
            same[name] = seen[place]
            continue
        seen[place] = name
        tensors[name] = value.detach().clone().contiguous()  # a clone: two may be views of one storage
    return tensors, plain, same


def _check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that a safetensors file can't hold."""
    if tensor.is_meta:
        why = "on the meta device, without values; load or make them first"
    elif tensor.layout is not torch.strided:
        why = f"of layout {tensor.layout}; make it dense in the network, by to_dense()"
    elif not _has_a_word_for(tensor.dtype):
        why = f"of type {tensor.dtype}; keep it as another in the network, such as by torch.view_as_real"
    else:
        return
    raise UnsavableError(
        f"{name} can't be written to a safetensors file: it is {why}, or write torch.save(vnet.state_dict(), ...)"
    )


def _has_a_word_for(dtype: torch.dtype) -> bool:
    try:
        library().torch.save({"none": torch.empty(0, dtype=dtype)})
    except (KeyError, RuntimeError):  # the latter of types that torch can't make like this
        return False
    return True


def _check_priors(vnet: VariationalModule) -> None:
    """Refuse priors that could not be made again of their settings."""
    for path, module in vnet.named_modules():
        for name, q in module.posteriors.items() if isinstance(module, VariationalModule) else ():
            try:
                type(q.prior).check_settings(q.prior.settings(), q.rho.shape)
            except PriorError as error:
                raise PriorError(
                    f"the prior of {path}{'.' * bool(path)}{name}, a {type(q.prior).__name__}, could not be loaded: "
                    f"{error}; give the class a from_settings of its own"
                ) from None


def _checked(name: str, value: object) -> Any:
    if not is_plain(value):
        raise UnsavableError(
            f"{name} is a {type(value).__name__} that JSON would change, and only tensors and plain values can be "
            "written to a safetensors file; torch.save(vnet.state_dict(), ...) takes it"
        )
    return value


def _umask() -> int:
    umask = os.umask(0)  # which can't be read without being set
    os.umask(umask)
    return umask


def _check(model: nn.Module, state: Mapping[str, Any], chosen: list[str], network: str) -> None:
    here = {name: tuple(slot.parameter.shape) for name, slot in first_slots(model).items()}
    there = {name: tuple(state[f"module.{name}"].shape) for name in chosen}
    missing = [f"{name} {shape}" for name, shape in there.items() if name not in here]
    if missing:
        told = f"the file is of a {network}, and this {type(model).__name__} has no {listed(missing)}"
    else:
        told = listed(
            f"{name} is {here[name]} here, {shape} in the file" for name, shape in there.items() if here[name] != shape
        )
    if missing or here | there != here:
        raise StructureError(f"{told}: give load a plain network made as the one that was converted")
