"""A run's folder: settings.toml, checkpoint.pt, metrics.json and what commands add, each whole or absent."""

import json
import os
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from varify import __version__
from varify.experiments import toml
from varify.experiments.errors import RunError, SettingsError
from varify.experiments.settings import Settings

FORMAT = 2  # of the folder; one number per change of what is in the files


class Run:
    """The folder of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def check_free(folder: Path) -> None:
        """Refuse a folder that has something in it.

        Raises:
            RunError: it has.
        """
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise RunError(f"{folder} exists and is not empty; give another --out, or --resume {folder}")
        except OSError as error:
            raise RunError(f"{folder} can't be read: {error.strerror or error}") from error

    @classmethod
    def create(cls, folder: Path, settings: Settings, state: dict[str, Any]) -> "Run":
        """A new folder with settings and a checkpoint, whole: it is made beside its place, and then renamed."""
        cls.check_free(folder)
        part = folder.parent / f".{folder.name}.part"
        try:
            part.mkdir(parents=True, exist_ok=True)
            made = cls(part)
            made.save_settings(settings)
            made.save(state)
            if folder.exists():
                folder.rmdir()
            os.replace(part, folder)
        except OSError as error:
            raise RunError(f"{folder} can't be made: {error.strerror or error}") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return cls(folder)

    def save_settings(self, settings: Settings) -> None:
        """In place of the former; `varify train --config` takes the file as well."""
        table = settings.as_dict() | {"run": {"varify": __version__, "format": FORMAT}}
        self.write("settings.toml", toml.written(table).encode())

    def settings(self) -> Settings:
        """The settings the run was made with.

        Raises:
            RunError: this is no run folder, or one of another version.
        """
        path = self.folder / "settings.toml"
        if not path.is_file():
            if (self.folder / "settings.json").is_file():
                raise RunError(f"{self.folder} was made by varify 0.1.0, before settings.toml; train it again")
            raise RunError(f"{self.folder} is no run folder: it has no settings.toml, which `varify train` writes")
        try:
            values = toml.read(path)
        except SettingsError as error:
            raise RunError(f"{path} is damaged: {error}") from error
        made = values.pop("run", {})
        if not isinstance(made, dict) or made.get("format") != FORMAT:
            by = made.get("varify", "another version") if isinstance(made, dict) else "another version"
            raise RunError(
                f"{self.folder} was made by varify {by}, whose runs varify {__version__} can't read; train it again, "
                "or install that version"
            )
        try:
            return Settings.of(values, str(path))
        except SettingsError as error:
            raise RunError(f"{error}; the run is damaged, or its data or model are of another varify") from error

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
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise RunError(f"{path} can't be read: {error.strerror or error}") from error
        except Exception as error:  # torch and pickle raise all sorts on bytes that are none of theirs
            raise RunError(f"{path} is no whole checkpoint ({type(error).__name__}); train it again") from error
        return state

    def report(self) -> dict[str, Any]:
        """What `metrics.json` says.

        Raises:
            RunError: the run has not ended, is of another version, or the file is damaged.
        """
        path = self.folder / "metrics.json"
        self.settings()  # which says it, if this is no run folder at all, or one of another version
        if not path.is_file():
            raise RunError(f"{self.folder} has not ended; go on with: varify train --resume {self.folder}")
        try:
            report: dict[str, Any] = json.loads(path.read_text())
            return report
        except (OSError, ValueError) as error:
            raise RunError(f"{path} can't be read: {error}") from error

    def write_json(self, name: str, content: object) -> Path:
        """A JSON file of the folder."""
        return self.write(name, (json.dumps(content, indent=2) + "\n").encode())

    def write(self, name: str, content: bytes) -> Path:
        """A file of the folder, whole."""
        return write_whole(self.folder / name, content)


def write_whole(path: Path, content: bytes) -> Path:
    """Write beside the file first, so that a full disk or a crash leaves the former.

    Raises:
        RunError: it can't be written.
    """
    part = path.parent / f".{path.name}.part"
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise RunError(f"{path} can't be written: {error.strerror or error}") from error
        raise
    return path
