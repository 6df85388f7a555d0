"""A run's folder: settings.json, checkpoint.pt, metrics.json and picture.png, each whole or absent."""

import json
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from varify.experiments.settings import Settings, SettingsError


class RunError(Exception):
    """A run folder can't be read or written; the message is one line."""


class Run:
    """The folder of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, settings: Settings) -> "Run":
        """A new folder. Refuses one that has something in it."""
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise RunError(f"{folder} exists and is not empty; give another --out, or --resume {folder}")
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{folder} can't be made: {error.strerror or error}") from error
        run = cls(folder)
        run.write("settings.json", json.dumps(settings.as_dict(), indent=2).encode())
        return run

    def discard(self) -> None:
        """Take back a folder that `create` has just made."""
        (self.folder / "settings.json").unlink(missing_ok=True)
        self.folder.rmdir()

    def settings(self) -> Settings:
        """The settings the run was made with."""
        try:
            return Settings(**json.loads((self.folder / "settings.json").read_text()))
        except OSError as error:
            raise RunError(f"{self.folder} is no run folder: {error.strerror or error}: settings.json") from error
        except (ValueError, TypeError, SettingsError) as error:
            raise RunError(f"{self.folder / 'settings.json'} is damaged: {error}") from error

    def save(self, state: dict[str, Any]) -> None:
        """The checkpoint, in place of the former."""
        buffer = BytesIO()
        torch.save(state, buffer)
        self.write("checkpoint.pt", buffer.getvalue())

    def load(self, device: torch.device) -> dict[str, Any]:
        """The checkpoint; nothing in it is executed."""
        path = self.folder / "checkpoint.pt"
        try:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        except OSError as error:
            raise RunError(f"{path} can't be read: {error.strerror or error}") from error
        except Exception as error:  # torch and pickle raise all sorts on bytes that are none of theirs
            text = str(error).splitlines()
            raise RunError(f"{path} is damaged ({type(error).__name__}{': ' + text[0] if text else ''})") from error
        state["random"] = state["random"].cpu()
        return state

    def write(self, name: str, content: bytes) -> Path:
        """A file of the folder, whole: written beside it first, so that a full disk or a crash leaves the former."""
        path, part = self.folder / name, self.folder / f".{name}.part"
        try:
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException as error:
            part.unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
            if isinstance(error, OSError):
                raise RunError(f"{path} can't be written: {error.strerror or error}") from error
            raise
        return path
