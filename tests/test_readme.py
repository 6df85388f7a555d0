"""Every Python block of the README runs, in order, as a reader would type it."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import varify

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
    names = {"net": Net(), "pretrained": Net(), "train_set": train_set, "loader": DataLoader(train_set, 8)}
    kinds, rules = dict(varify.priors.KINDS), dict(varify.estimators._RULES)
    try:
        for block in BLOCKS:
            exec(block, names)
    finally:
        varify.priors.KINDS.clear()
        varify.priors.KINDS.update(kinds)
        varify.estimators._RULES.clear()
        varify.estimators._RULES.update(rules)
    assert len(BLOCKS) >= 6
    assert isinstance(names["pred"], varify.Prediction)
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


@pytest.mark.parametrize("path", re.findall(r"^\| `([a-z_]+\.py)`", README, flags=re.MULTILINE))
def test_files_that_the_readme_tells_of_exist(path: str) -> None:
    assert (Path(varify.__file__).parent / path).exists()
