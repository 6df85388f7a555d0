"""Results of benchmarks as JSON files: figures by name, with machine, date and versions."""

import contextlib
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


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where and when figures were made."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{name}, {os.cpu_count()} cores, {platform.platform()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device.type,
    }


def processor() -> str:
    """Its name, by Linux' own word where there is one."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
