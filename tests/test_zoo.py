"""Every architecture of the zoo; what holds for each is in tests/zoo/README.md."""

import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.zoo import GROUPS, torch_layers
from tests.zoo.checks import examine
from tests.zoo.entries import Entry

TABLE = (Path(__file__).parent / "zoo" / "README.md").read_text()
SIGHT = {name: float(seen) for name, seen in re.findall(r"^\| (.+?) \| [\d,]+ \| ([\d.]+) \|", TABLE, re.MULTILINE)}


def cases() -> Iterator[Any]:
    for group, module in GROUPS.items():
        try:
            for name, entry in module.entries().items():
                yield pytest.param(name, entry, id=f"{group}: {name}")
        except pytest.skip.Exception as why:
            yield pytest.param("", None, id=group, marks=pytest.mark.skip(reason=str(why)))


@pytest.mark.parametrize(("name", "entry"), list(cases()))
def test_any_network(name: str, entry: Entry) -> None:
    record = examine(name, entry)
    assert not record.failures
    assert record.variational > 0
    assert record.sight == pytest.approx(SIGHT[name], abs=0.002)


def test_every_layer_of_torch_that_has_parameters_is_in_the_zoo() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about deprecations and empty tensors
        tried = {type(m) for entry in torch_layers.entries().values() for m in entry.make().modules()}
    layers = {c for c in vars(nn).values() if inspect.isclass(c) and issubclass(c, nn.Module) and c is not nn.Module}
    lazy = {c for c in layers if issubclass(c, nn.modules.lazy.LazyModuleMixin)}  # become other layers at a call
    bare = {nn.RNNBase, nn.RNNCellBase}
    missing = {c.__name__ for c in layers - tried - lazy - bare if _has_parameters(c)}
    assert not missing
    assert len(tried) > 40


def _has_parameters(layer: type) -> bool:
    own = [c for c in layer.__mro__ if c.__module__.startswith("torch.nn") and c is not nn.Module]
    return any(re.search(r"\bParameter\(|register_parameter\(", inspect.getsource(c)) for c in own)


def test_the_table_has_every_architecture_and_no_failure() -> None:
    rows = re.findall(r"^\| (.+?) \| [\d,]+ \| [\d.]+ \| (at once|one by one) \|", TABLE, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(case.values[0] for case in cases())
    assert "Failures: none." in TABLE


def test_rules_reach_nearly_all_weights_of_the_networks_that_people_use() -> None:
    pooled = dict(re.findall(r"^\| (\w+) \| \d+ \| \d+ \(100%\) \| \d+ \| ([\d.]+) \|", TABLE, re.MULTILINE))
    assert float(pooled["transformers"]) >= 0.95
    assert float(pooled["timm"]) >= 0.98
    assert float(pooled["torchvision"]) >= 0.98
