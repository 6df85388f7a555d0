"""The tree shows the architecture: imports go down only, and what knows tensors alone stays that way."""

import ast
from pathlib import Path

import varify

PACKAGE = Path(varify.__file__).parent
# From the bottom up. A file may import what stands before it.
ORDER = [
    *("errors", "divergence", "moments", "posteriors", "priors", "factorised", "inits", "estimators", "checkpoints"),
    *("likelihoods", "schedules", "trees", "prediction", "draws", "summary"),
    *("reachable", "replacing", "copies", "sharding", "signature", "selection", "parts", "view", "graph", "slots"),
    *("module", "variationalize", "arguments", "objective", "batches", "fitting", "saving", "pruning", "description"),
]
# The folder that is alone with torch.fx, likewise.
GRAPH = ["views", "recording", "examples", "planning", "rewriting", "standins", "plans"]
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
    assert names | {"graph"} == set(ORDER)
    for i, name in enumerate(ORDER):
        paths = [PACKAGE / f"{name}.py"] if name != "graph" else list((PACKAGE / "graph").glob("*.py"))
        used = {m.split(".")[1] for path in paths for m in imports(path) if m.startswith("varify.")} - {"graph"}
        used |= {"graph"} if name != "graph" and any(_uses_graph(path) for path in paths) else set()
        assert used <= set(ORDER[:i]), f"{name} imports {used - set(ORDER[:i])}"


def _uses_graph(path: Path) -> bool:
    return any(m.startswith("varify.graph") for m in imports(path))


def test_imports_in_the_folder_of_graphs_go_down() -> None:
    assert {path.stem for path in (PACKAGE / "graph").glob("*.py")} - {"__init__"} == set(GRAPH)
    for i, name in enumerate(GRAPH):
        found = imports(PACKAGE / "graph" / f"{name}.py")
        used = {m.split(".")[2] for m in found if m.startswith("varify.graph.")}
        assert used <= set(GRAPH[:i]), f"{name} imports {used - set(GRAPH[:i])}"


def test_what_knows_tensors_alone() -> None:
    for name in TENSORS_ALONE:
        assert not [m for m in imports(PACKAGE / f"{name}.py") if m.startswith("torch.fx")]


def test_torch_fx_is_in_one_folder() -> None:
    outside = [path.stem for path in PACKAGE.glob("*.py") if "torch.fx" in imports(path)]
    assert outside == ["module"]  # for the type of what `graph` returns


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
