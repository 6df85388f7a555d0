"""Classes that are known by a name: the one decorator behind those for priors and initializations."""

from collections.abc import Callable
from typing import Any, TypeVar

from varify.errors import VarifyError

C = TypeVar("C", bound=type)


def named(name: str, base: type, public: str, table: dict[str, Any], error: type[VarifyError]) -> Callable[[C], C]:
    """Decorate a class that `table` is to have under `name`.

    Args:
        name: that it gets.
        base: what it must be a subclass of.
        public: name of that, for users.
        table: classes by name.
        error: what is raised.

    Raises:
        VarifyError: `error`: no name, no subclass, or the name of another class.
    """
    if not isinstance(name, str):
        raise error(f"register takes the name, as in @register('mine'), got {name!r}")

    def decorate(kind: C) -> C:
        if not (isinstance(kind, type) and issubclass(kind, base)):
            raise error(f"the class must be a subclass of {public}, got {kind!r}")
        former = table.get(name)
        if former is not None and not is_same(former, kind):
            raise error(f"the name {name!r} is taken by {former.__module__}.{former.__qualname__}; choose another")
        table[name] = kind
        return kind

    return decorate


def is_same(one: type, other: type) -> bool:
    """Whether two classes are one, or one that was defined again, as in a notebook."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)
