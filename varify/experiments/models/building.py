"""A network for a data set: by name, or by a factory that the user names."""

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from varify.experiments.data import Images
from varify.experiments.errors import SettingsError, UsersError, nearest
from varify.experiments.models.networks import MODELS

ARGUMENTS = ("classes", "channels", "size", "activation")


def build(model: str, activation: str | None, images: Images) -> nn.Module:
    """The network, tried on two images.

    Args:
        model: of `MODELS`, or `package.module:factory`. The factory is called with those of the keywords `classes`,
            `channels`, `size` and `activation` that its signature names.
        activation: None: the model's own.
        images: that it is for.

    Raises:
        SettingsError: there is no such model, or it doesn't fit the images.
        UsersError: the user's code raised.
    """
    known = dict(zip(ARGUMENTS, (len(images.classes), images.channels, images.size, activation), strict=True))
    factory = MODELS[model] if model in MODELS else _imported(model)
    try:
        named = set(inspect.signature(factory).parameters) & set(ARGUMENTS)
    except (TypeError, ValueError):  # of a builtin
        named = set()
    if activation is not None and "activation" not in named:
        raise SettingsError(f"model {model!r} takes no activation; leave it out")
    try:
        network = factory(**{name: known[name] for name in sorted(named) if known[name] is not None})
    except Exception as error:
        raise UsersError(f"model {model!r} raised {type(error).__name__} when it was made; see above", error) from error
    if not isinstance(network, nn.Module):
        raise SettingsError(f"model {model!r} must give a torch.nn.Module, got a {type(network).__name__}")
    _try(network, model, images)
    return network


def _imported(model: str) -> Callable[..., nn.Module]:
    module_name, colon, name = model.partition(":")
    if not colon:
        raise SettingsError(
            f"model {model!r} is unknown; there are {', '.join(MODELS)}, and package.module:factory for your own"
            f"{nearest(model, MODELS)}"
        )
    here = str(Path.cwd())
    if here not in sys.path:  # as with `python -m`; the console script has its own folder there
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UsersError(f"module {module_name!r} can't be imported: {error}; see above", error) from error
        raise SettingsError(f"model {model!r}: there is no module {error.name!r} here or installed") from error
    except Exception as error:
        told = f"module {module_name!r} raised {type(error).__name__} when it was imported; see above"
        raise UsersError(told, error) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise SettingsError(f"model {model!r}: {module_name} has no function {name!r}{nearest(name, dir(module))}")
    return factory  # type: ignore[no-any-return]


@torch.no_grad()
def _try(network: nn.Module, model: str, images: Images) -> None:
    """Run two images through it, in eval mode, so that no statistics change."""
    modes = [(module, module.training) for module in network.modules()]
    shape = tuple(images.train.shape[1:])
    try:
        output = network.eval()(images.train[:2].cpu())
    except Exception as error:
        if model in MODELS:
            raise SettingsError(
                f"{model} takes images of 32 pixels a side, not {images.size}; set --size 32"
            ) from error
        raise UsersError(f"model {model!r} raised on images of shape (2, {shape}); see above", error) from error
    finally:
        for module, mode in modes:
            module.training = mode
    found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if found != (2, len(images.classes)):
        raise SettingsError(
            f"model {model!r} gives {found} for two images, and the data have {len(images.classes)} classes: the "
            f"output must be logits of shape (2, {len(images.classes)})"
        )
