"""Every Python block of the README runs, in order, as a reader would type it."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import varify
from varify import inits
from varify.estimators import rules
from varify.priors import registry
from varify.weights import kl

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def test_the_readmes_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    train_set = TensorDataset(torch.randn(20, 4), torch.randint(3, (20,)))
    readme = ModuleType("readme")  # a module, since what is pickled has one
    monkeypatch.setitem(sys.modules, "readme", readme)
    names = readme.__dict__
    names |= {"net": Net(), "pretrained": Net(), "train_set": train_set, "loader": DataLoader(train_set, 8)}
    names["validation_loader"] = DataLoader(TensorDataset(torch.randn(20, 4), torch.randint(3, (20,))), 8)
    tables = registry._BY_NAME, inits._BY_NAME, rules._RULES, kl._RULES
    before = [dict(table) for table in tables]
    try:
        for block in BLOCKS:
            exec(block, names)
        contracts = [value for name, value in names.items() if name.startswith("Test")]
        for contract in contracts:
            for test in (name for name in dir(contract) if name.startswith("test_")):
                getattr(contract(), test)()
    finally:
        for table, was in zip(tables, before, strict=True):
            table.clear()
            table.update(was)
    assert len(BLOCKS) >= 6
    assert len(contracts) == 3
    assert isinstance(names["pred"], varify.Prediction)
    assert names["temperature"] > 0
    assert names["terms"].loss.isfinite()
    assert (tmp_path / "net.safetensors").exists()


def test_what_the_readme_names_exists() -> None:
    for name in set(re.findall(r"varify\.([A-Za-z_]+(?:\.[A-Za-z_]+)?)", README)):
        target: object = varify
        for part in name.split("."):
            if part in {"py", "md"}:
                break
            target = getattr(target, part, None)
            assert target is not None, f"varify.{name}"


ARCHITECTURE = Path(varify.__file__).parent / "ARCHITECTURE.md"


@pytest.mark.parametrize("path", re.findall(r"`([a-z_/]+\.py)`", ARCHITECTURE.read_text()))
def test_files_that_the_architecture_tells_of_exist(path: str) -> None:
    assert (ARCHITECTURE.parent / path).exists() or (ARCHITECTURE.parent.parent / path).exists()


def test_the_architecture_tells_of_every_folder() -> None:
    for folder in (path for path in ARCHITECTURE.parent.iterdir() if (path / "__init__.py").exists()):
        assert f"{folder.name}/" in ARCHITECTURE.read_text()
