"""Results of benchmarks as JSON files: figures by name, with machine, date and versions."""

import datetime
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import varify

FOLDER = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.platform()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def keep(path: Path | None, name: str, found: Mapping[str, object]) -> None:
    """Write one result into a file, whose others stay; None: nowhere."""
    if path is None:
        return
    results = json.loads(path.read_text()) if path.exists() else {}
    results[name] = {**machine(), "varify": varify.__version__, **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)
