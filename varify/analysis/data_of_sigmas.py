"""Which data a network's sigmas were fitted to, so that nobody takes them for held-out data."""

import weakref

from torch import nn

_loaders: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[object]]" = weakref.WeakKeyDictionary()


def remember(vnet: nn.Module, loader: object) -> None:
    """Note the data set of this loader, or the loader where it has none, without keeping either alive."""
    try:
        _loaders[vnet] = weakref.ref(_data_of(loader))
    except TypeError:  # a list or an iterator, which can't be known again
        _loaders.pop(vnet, None)


def were(vnet: nn.Module, loader: object) -> bool:
    """Whether these are the data that were noted for this network."""
    noted = _loaders.get(vnet)
    return noted is not None and noted() is _data_of(loader)


def _data_of(loader: object) -> object:
    return getattr(loader, "dataset", loader)
