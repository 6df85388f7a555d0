"""The commands, one a file: `add(parser)` gives a parser its options, and `do(options)` does it."""

from types import ModuleType

from varify.experiments.commands import (
    compare,
    completion,
    diagnose,
    evaluate,
    mdl,
    plot,
    prune,
    record,
    train,
    uncertainty,
)

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "uncertainty": uncertainty,
    "record": record,
    "plot": plot,
    "prune": prune,
    "mdl": mdl,
    "diagnose": diagnose,
    "completion": completion,
}
