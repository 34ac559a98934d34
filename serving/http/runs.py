"""What training leaves in the runs folder, for who watches it: runs, their curves, the ladder.

It is read while it is written: what is cut short or damaged is left out. A run's name is one of
those that were found, so that none can lead out of the folder; no link is followed out of it.
"""

import inspect
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt import CHAPTERS

TAIL = 2**16
"""Bytes at the end of metrics.jsonl in which the newest figures are looked for."""

Json = dict[str, Any]


class RunBrowser:
    """A folder of runs, and of folders of runs, such as a ladder.

    Args:
        folder: Where they are; without one there are none.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder.resolve() if folder else None

    def find(self) -> dict[str, Path]:
        """The runs' directories by name: by their paths below the folder."""
        if self.folder is None:
            return {}
        near = _folders(self.folder)
        far = [folder for one in near for folder in _folders(one)]
        runs = [folder for folder in near + far if self._inside(folder / "run.json")]
        return {run.relative_to(self.folder).as_posix(): run for run in runs}

    def name_of(self, run: Path) -> str | None:
        """The name of a directory, where it is one of these."""
        here = run.resolve()
        return next((name for name, path in self.find().items() if path.resolve() == here), None)

    def overview(self) -> list[Json]:
        """What is known of each run that can be read, the newest first."""
        found = []
        for name, run in self.find().items():
            config, newest = self._config(run), self._newest(run)
            if config is not None:
                asked = {
                    key: config["config"].get(key) for key in ("task", "model", "preset", "steps")
                }
                figures = ("step", "tokens", "seconds", "loss", "validation_loss")
                reached = {key: newest.get(key) for key in (*figures, "final_bits_per_byte")}
                found.append(
                    {
                        "name": name,
                        **asked,
                        **reached,
                        "updated": _changed(run / "metrics.jsonl") or _changed(run / "run.json"),
                        "finished": self._is_finished(run, newest),
                        "parameters": config.get("parameters"),
                    }
                )
        return sorted(found, key=lambda line: float(line["updated"]), reverse=True)

    def one(self, name: str, after: int = 0) -> Json | None:
        """A run's configuration and the lines of its metrics from a byte on; None if it cannot be read.

        `restarted` says that there is no line at that byte, since training has gone back to a
        checkpoint: then all lines are told.
        """
        run = self.find().get(name)
        config = self._config(run) if run else None
        if run is None or config is None:
            return None
        data = self._read(run / "metrics.jsonl")
        restarted = bool(after) and data[after - 1 : after] != b"\n"
        start, end = 0 if restarted else after, data.rfind(b"\n") + 1
        return {
            "name": name,
            "config": config["config"],
            "metrics": [*_lines(data[start:end])],
            "next": end,
            "finished": self._is_finished(run, self._newest(run)),
            **({"restarted": True} if restarted else {}),
        }

    def ladder(self) -> Json:
        """The rows of the newest ladder, and every rung with what its code says of it."""
        rungs = {
            name: {
                "name": name,
                "chapter": model.chapter,
                "year": model.year,
                "paper": model.paper,
                "idea": model.idea,
                "description": inspect.getdoc(sys.modules[model.__module__]),
            }
            for name, model in CHAPTERS.items()
        }
        source, rows = self._newest_ladder()
        for row in rows:
            rung = rungs.get(str(row.get("rung")), {})
            row |= {key: rung.get(key) for key in ("paper", "idea", "description")}
        return {"rows": rows, "rungs": [*rungs.values()], "source": source}

    def _newest_ladder(self) -> tuple[str | None, list[Json]]:
        """The name of its folder and its rows; runs/ladder before all others."""
        if self.folder is None:
            return None, []
        files = [folder / "ladder.json" for folder in (self.folder, *_folders(self.folder))]
        usual = self.folder / "ladder" / "ladder.json"
        for file in sorted(files, key=lambda file: (file == usual, _changed(file)), reverse=True):
            rows = _parsed(self._read(file))
            if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
                return file.parent.name, rows
        return None, []

    def _config(self, run: Path) -> Json | None:
        """What run.json holds, where it can be read."""
        config = _parsed(self._read(run / "run.json"))
        good = isinstance(config, dict) and isinstance(config.get("config"), dict)
        return config if good else None

    def _newest(self, run: Path) -> Json:
        return latest_metrics(run) if self._inside(run / "metrics.jsonl") else {}

    def _is_finished(self, run: Path, figures: Json) -> bool:
        """Whether it has its final score; a ladder's rung has it in a file of its own."""
        scored = any(key.startswith("final_") for key in figures)
        return scored or (run / "rung.json").is_file()

    def _inside(self, file: Path) -> bool:
        """Whether there is such a file, and no link leads out of the folder to it."""
        try:
            return file.is_file() and file.resolve().is_relative_to(self.folder or "")
        except OSError:
            return False

    def _read(self, file: Path) -> bytes:
        """What is in a file; nothing where it cannot be read."""
        try:
            return file.read_bytes() if self._inside(file) else b""
        except OSError:
            return b""


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in sorted(folder.iterdir()) if path.is_dir()]
    except OSError:  # it may have gone meanwhile
        return []


def latest_metrics(run: Path) -> Json:
    """The newest value of each figure at the end of a run's metrics."""
    found: Json = {}
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            for line in _lines(file.read()):
                found |= line
    except OSError:
        pass
    return found


def _lines(data: bytes) -> Iterator[Json]:
    """The objects in whole lines."""
    for line in data.split(b"\n")[:-1]:
        values = _parsed(line)
        if isinstance(values, dict):
            yield values


def _parsed(data: bytes) -> Any:  # noqa: ANN401 (what JSON can hold)
    """A JSON value; None where it is none. What is no number to other languages is null."""
    try:
        return json.loads(data, parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def _finite(number: str) -> float | None:
    value = float(number)
    return value if math.isfinite(value) else None


def _changed(file: Path) -> float:
    """When a file was written, in unix seconds; 0 where there is none."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
