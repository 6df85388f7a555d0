"""Python code that would decide something about a traced value without the value's knowledge.

A traced value can refuse a comparison, a hash, a type check. It can't see `type(x)`, `id(x)`, `x is y`, nor that its
refusal was caught by somebody else's `except`. Such code is found by its bytecode.
"""

import dis
import gc
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

# torch's own functions dispatch on traced values; varify's are the tracer; the standard library asks nothing of values.
_TRUSTED = frozenset({"torch", "varify", *sys.stdlib_module_names} - {"__main__"})
DRAWS = "it draws random numbers that torch.fx can't see"
_ASKING = frozenset({"type", "id"})
_CATCHING = frozenset({"PUSH_EXC_INFO", "SETUP_FINALLY", "SETUP_WITH"})


@lru_cache(maxsize=4096)
def hazard(code: CodeType) -> str | None:
    """What in a function's code can go wrong unseen, or None."""
    before: dis.Instruction | None = None
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in _CATCHING:
            return f"{code.co_name} has a try or with statement"
        if name in ("LOAD_GLOBAL", "LOAD_NAME") and instruction.argval in _ASKING:
            return f"{code.co_name} asks {instruction.argval}()"
        if name == "IS_OP" and not (before is not None and before.opname == "LOAD_CONST" and before.argval is None):
            return f"{code.co_name} compares by identity"
        if name == "STORE_GLOBAL" or (name == "STORE_DEREF" and instruction.argval in code.co_freevars):
            return f"{code.co_name} sets {instruction.argval}, which is not its own"
        before = instruction
    return None


@contextmanager
def watched(report: Callable[[str], Any]) -> Iterator[None]:
    """Within, on this thread, `report` is called with the hazard of every function that is entered and has one.

    Also with `DRAWS` where a number is drawn from Python's global generator.
    """
    generator = random.random.__self__  # type: ignore[attr-defined]

    def on_event(frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and getattr(argument, "__self__", None) is generator:
            report(DRAWS)
        if event == "call" and str(frame.f_globals.get("__name__", "")).partition(".")[0] not in _TRUSTED:
            found = hazard(frame.f_code)
            if found is not None:
                report(found)

    before, collecting = sys.getprofile(), gc.isenabled()
    gc.disable()  # others' callbacks of the collector would be taken for the network's code
    sys.setprofile(on_event)
    try:
        yield
    finally:
        sys.setprofile(before)
        if collecting:
            gc.enable()
