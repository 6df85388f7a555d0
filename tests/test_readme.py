"""Every Python block of the README and of the docs runs, in order and page by page, as a reader would type it.

The guides have tests of their own, where the figures that they show are compared.
"""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import varify
from docs import hooks
from varify import inits
from varify.estimators import rules
from varify.experiments.cli import parsers
from varify.priors import registry
from varify.weights import kl

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
# coming-from.md and those in guides/ make their own data
PAGES = [README, *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem != "coming-from")]
BLOCK = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def classes(n: int) -> TensorDataset:
    x = torch.randn(n, 4)
    return TensorDataset(x, x[:, :3].argmax(1))


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """What the pages take for given. What they register is forgotten afterwards, and what they draw."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    torch.manual_seed(0)
    train_set, held_out = classes(20), classes(100)
    x, y = train_set.tensors
    pretrained = Net()
    optimizer = torch.optim.Adam(pretrained.parameters(), lr=0.03)
    for _ in range(30):  # a temperature from held-out data needs a network that has learned something
        optimizer.zero_grad()
        nn.functional.cross_entropy(pretrained(x), y).backward()
        optimizer.step()
    vnet = varify.variationalize(Net())
    page = ModuleType("page")  # a module, since what is pickled has one
    monkeypatch.setitem(sys.modules, "page", page)
    page.__dict__.update(torch=torch, nn=nn, F=nn.functional, varify=varify, x=x, y=y, train_set=train_set)
    page.__dict__.update(
        net=Net(), pretrained=pretrained, vnet=vnet, pred=vnet.predict(x), elbo=varify.ELBO(num_data=20)
    )
    page.__dict__.update(loader=DataLoader(train_set, 8), validation_loader=DataLoader(held_out, 8))
    tables = registry._BY_NAME, inits._BY_NAME, rules._RULES, kl._RULES
    before = [dict(table) for table in tables]
    yield page.__dict__
    for table, was in zip(tables, before, strict=True):
        table.clear()
        table.update(was)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=title)
def test_a_pages_code_runs(page: Path, names: dict[str, object]) -> None:
    for block in BLOCK.findall(page.read_text()):
        with redirect_stdout(StringIO()):
            exec(compile(block, title(page), "exec"), names)
    contracts = [value for name, value in names.items() if name.startswith("Test") and isinstance(value, type)]
    for contract in contracts:
        for test in (name for name in dir(contract) if name.startswith("test_")):
            getattr(contract(), test)()
    assert len(contracts) == (3 if page.stem == "extending" else 0)


def test_the_readme_is_short_and_its_picture_there() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 130
    for picture in re.findall(r'src(?:set)?="([^"]+)"', text):
        assert 0 < (ROOT / picture).stat().st_size < 100_000


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").rglob("*.md"))], ids=title)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    for name in set(re.findall(r"(?<![/.\w])varify((?:\.[A-Za-z_]+)+)", text)):
        target: object = varify
        for part in name[1:].split("."):
            if part in {"py", "md", "api"}:
                break
            try:
                target = getattr(target, part)
            except AttributeError:  # a module that is not imported yet
                target = importlib.import_module(f"{getattr(target, '__name__', '')}.{part}")
    for module in set(re.findall(r"python -m ((?:tests|docs)[a-z_.]+)", text)):
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_a_pages_commands_and_options_exist(page: Path) -> None:
    _, commands = parsers()
    for command, rest in re.findall(r"^varify ([a-z]+)(.*)$", page.read_text(), flags=re.MULTILINE):
        options = {option for action in commands[command]._actions for option in action.option_strings}
        assert options.issuperset(re.findall(r"(--[a-z-]+)", rest)), (command, rest)
    for command in re.findall(r"`varify ([a-z]+)", page.read_text()):
        assert command in commands


def test_the_reference_has_every_public_name() -> None:
    told = set(re.findall(r"^::: (\S+)", "\n".join(p.read_text() for p in (ROOT / "docs" / "api").glob("*.md")), re.M))
    parts = [value for value in (getattr(varify, name) for name in varify.__all__) if isinstance(value, ModuleType)]
    wanted = {
        f"{module.__name__}.{name}"
        for module in (varify, varify.graph, *parts)
        for name in module.__all__
        if not isinstance(getattr(module, name), ModuleType)
    }
    wanted = {name.replace("varify.objective.schedules", "varify.schedules") for name in wanted}
    assert len(wanted) > 80
    assert wanted - told == set()


def test_committed_results_become_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(hooks, "RESULTS", results)
    row = {"torch": "2", "ll": {"mean": -2.59, "error": 0.086}, "rmse": 2.987, "splits": [{"ll": 1.0}, {"ll": 2.0}]}
    (results / "uci.json").write_text(json.dumps({"boston": row, "yacht": {"rmse": 0.5, "torch": "2"}}))
    text = hooks.on_page_markdown(f"before\n{hooks.MARK}\nafter")
    assert text.startswith("before\n### uci")
    assert "`python -m tests.benchmarks.uci`; torch 2\n" in text
    assert "| boston | -2.59 ± 0.086 | 2.99 |\n| yacht |  | 0.5 |" in text
    assert hooks.on_page_markdown("no mark") == "no mark"


ARCHITECTURE = Path(varify.__file__).parent / "ARCHITECTURE.md"


@pytest.mark.parametrize("path", re.findall(r"`([a-z_/]+\.py)`", ARCHITECTURE.read_text()))
def test_files_that_the_architecture_tells_of_exist(path: str) -> None:
    assert (ARCHITECTURE.parent / path).exists() or (ARCHITECTURE.parent.parent / path).exists()


def test_the_architecture_tells_of_every_folder() -> None:
    for folder in (path for path in ARCHITECTURE.parent.iterdir() if (path / "__init__.py").exists()):
        assert f"{folder.name}/" in ARCHITECTURE.read_text()
