"""The tree shows the architecture: imports go down only, and what knows tensors alone stays that way."""

import ast
from pathlib import Path

import varify

PACKAGE = Path(varify.__file__).parent
# From the bottom up. A file may import what stands before it.
ORDER = [
    *("errors", "divergence", "posteriors", "priors", "factorised", "inits", "estimators", "checkpoints"),
    *("likelihoods", "schedules"),
    *(
        "trees",
        "prediction",
        "calls",
        "draws",
        "summary",
        "reachable",
        "copies",
        "hazards",
        "snapshots",
        "turns",
        "modes",
        "recomputing",
        "sharding",
        "swapping",
        "traced",
        "tracing",
        "rewriting",
        "selection",
        "programs",
    ),
    *("module", "variationalize", "arguments", "objective", "batches", "fitting", "saving", "pruning", "description"),
]
TENSORS_ALONE = (
    "errors",
    "divergence",
    "posteriors",
    "priors",
    "inits",
    "estimators",
    "prediction",
    "draws",
    "summary",
)


def imports(path: Path) -> set[str]:
    """Modules that a file imports, but for those under `if TYPE_CHECKING`."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    hidden = {id(n) for i in ast.walk(tree) if isinstance(i, ast.If) and _is_for_types(i) for n in ast.walk(i)}
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _is_for_types(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_imports_go_down() -> None:
    names = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert names == set(ORDER)
    for i, name in enumerate(ORDER):
        used = {m.split(".")[1] for m in imports(PACKAGE / f"{name}.py") if m.startswith("varify.")}
        assert used <= set(ORDER[:i]), f"{name} imports {used - set(ORDER[:i])}"


def test_what_knows_tensors_alone() -> None:
    for name in TENSORS_ALONE:
        assert not [m for m in imports(PACKAGE / f"{name}.py") if m.startswith("torch.fx")]


def test_core_needs_torch_and_numpy_alone_and_experiments_use_public_names() -> None:
    allowed = {"torch", "numpy", "varify"}
    import sys

    for path in PACKAGE.glob("*.py"):
        if path.stem != "__main__":
            outside = {m.split(".")[0] for m in imports(path)} - set(sys.stdlib_module_names) - allowed
            optional = {"safetensors"} if path.stem == "saving" else set()
            assert not outside - optional, f"{path.name} imports {outside}"
    public = {f"varify.{name}" for name in varify.__all__} | {"varify", "varify.__version__"}
    for path in (PACKAGE / "experiments").glob("*.py"):
        used = {m for m in imports(path) if m.startswith("varify") and not m.startswith("varify.experiments")}
        assert used <= public, f"{path.name} uses {used - public}"
