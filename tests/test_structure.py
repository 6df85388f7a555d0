"""The tree shows the architecture: imports go down only, and no file or class grows beyond what can be read at once."""

import ast
import importlib
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import varify

PACKAGE = Path(varify.__file__).parent
# From the bottom up: a folder, or a file beside the folders, may import what stands before it. Within a folder imports
# form no circle. So a new file in a folder needs no edit here.
LAYERS = (
    *(
        "errors",
        "naming",
        "weights",
        "network",
        "priors",
        "estimators",
        "inits",
        "prediction",
        "posteriors",
        "graph",
    ),
    *(
        "state",
        "summary",
        "compiled",
        "within",
        "propagation",
        "predicting",
        "any_network",
        "module",
        "variationalize",
        "objective",
        "optim",
        "file_settings",
        "serialization",
        "ensembles",
    ),
    *("analysis", "plots", "integrations", "testing", "experiments"),
)
MOST_LINES, MOST_CLASS_LINES, MOST_METHODS, MOST_IMPORTS = 300, 250, 25, 10
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))


def name_of(path: Path) -> str:
    return ".".join(("varify", *path.relative_to(PACKAGE).with_suffix("").parts))


MODULES = {name_of(path) for path in FILES}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, also within functions and for types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def own(path: Path) -> set[str]:
    """Modules and folders of the package that a file imports."""
    folders = {f"varify.{layer}" for layer in LAYERS}
    found = {name for name in imports(path) if name in MODULES | folders}
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def layer_of(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    assert layer_of(name_of(path)) in LAYERS, "a new folder, or file beside the folders, has its place in LAYERS"
    below = LAYERS[: LAYERS.index(layer_of(name_of(path)))]
    used = {layer_of(name) for name in own(path)} - {layer_of(name_of(path))}
    assert used <= set(below), f"{name_of(path)} imports {used - set(below)}, which stand above it"


def test_imports_within_folders_form_no_circle() -> None:
    arrows = {name_of(path): {n for n in own(path) if n.count(".") == 2} for path in FILES}
    TopologicalSorter(arrows).prepare()  # raises CycleError


def test_what_knows_one_weight_knows_no_network_and_only_the_pass_knows_torch_fx() -> None:
    for path in FILES:
        used, layer = imports(path), layer_of(name_of(path))
        if layer in ("weights", "priors", "estimators"):
            assert not any(name.startswith(("varify.network", "varify.graph")) for name in used), path
        if layer != "graph":
            assert not any(name.startswith("torch.fx") for name in used), path


def test_no_import_is_hidden_from_the_run() -> None:
    for path in FILES:
        assert "TYPE_CHECKING" not in path.read_text(), path


def test_the_core_needs_torch_and_numpy_alone_and_experiments_use_public_names() -> None:
    allowed = {"torch", "numpy", "varify", *sys.stdlib_module_names}
    public = {f"varify.{name}" for name in varify.__all__} | {"varify", "varify.__version__"}
    for path in FILES:
        if layer_of(name_of(path)) == "experiments":
            used = {m for m in imports(path) if m.startswith("varify") and not m.startswith("varify.experiments")}
            assert used <= public, f"{path.name} uses {used - public}"
        else:
            outside = {m.split(".")[0] for m in imports(path)} - allowed
            optional = {"serialization": {"safetensors"}, "joining": {"tqdm"}}.get(path.stem, set())
            if layer_of(name_of(path)) == "plots":
                optional = {"matplotlib"}
            if layer_of(name_of(path)) == "integrations":  # a library a file, imported when it is asked for
                optional = {path.stem.removeprefix("with_")}
            assert not outside - optional, f"{path.name} imports {outside}"


@pytest.mark.parametrize(
    "name",
    [
        "varify",
        *(f"varify.{n}" for n in ("estimators", "graph", "inits", "integrations", "plots", "priors", "propagation")),
    ],
)
def test_public_modules_say_what_is_public(name: str) -> None:
    module = importlib.import_module(name)
    listed = module.__all__
    assert sorted(set(listed)) == sorted(listed)
    assert all(hasattr(module, one) for one in listed)
    for one in listed:
        found = getattr(module, one)
        assert found.__doc__ or not callable(found), one


def test_every_refusal_is_an_error_of_varifys() -> None:
    plain = {"ValueError", "TypeError", "KeyError", "FileNotFoundError", "IndexError"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                internal = path.stem == "vectorizing"  # they are caught a few lines on
                assert node.exc.func.id not in plain or internal, f"{path}:{node.lineno}"


def test_few_arguments_are_of_any_type() -> None:
    annotations = [
        ast.unparse(a.annotation)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg)
        if a is not None and a.annotation is not None
    ]
    assert annotations.count("Any") < 0.05 * len(annotations)


def classes(path: Path) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_classes_can_be_read_at_once(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES
    assert len(own(path)) <= MOST_IMPORTS, sorted(own(path))
    for node in classes(path):
        assert (node.end_lineno or 0) - node.lineno < MOST_CLASS_LINES, node.name
        methods = [n for n in node.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        assert len(methods) <= MOST_METHODS, f"{node.name} has {len(methods)}"
