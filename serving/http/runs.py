"""The runs folder for the web page: runs, their metrics, and the results of the ladder.

Files are read while training writes them: incomplete and damaged parts are left out. Only names
found in the folder are accepted and no link out of it is followed, so no path leads out of it.
"""

import contextlib
import inspect
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt import CHAPTERS

TAIL_BYTES = 2**16
"""Bytes at the end of metrics.jsonl that are searched for the latest metrics."""

Json = dict[str, Any]


class RunBrowser:
    """A folder of runs, and of folders of runs such as a ladder's; without `folder`, an empty one."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or Path(os.devnull)).resolve()

    def run_dirs(self) -> dict[str, Path]:
        """Return the run directories by name, which is the path relative to the folder."""
        runs = [file.parent for file in self._find("*/run.json", "*/*/run.json")]
        return {run.relative_to(self.folder).as_posix(): run for run in runs}

    def name_of(self, run: Path) -> str | None:
        """Return the name of a run directory, or None if it is not in the folder."""
        resolved = run.resolve()
        runs = self.run_dirs().items()
        return next((name for name, path in runs if path.resolve() == resolved), None)

    def summaries(self) -> list[Json]:
        """Return configuration and latest metrics of each readable run, the newest first."""
        summaries = []
        metrics = ("step", "tokens", "seconds", "loss", "validation_loss", "final_bits_per_byte")
        for name, run in self.run_dirs().items():
            if (contents := self._read_run(run)) is None:
                continue
            metadata, latest, finished = contents
            config = metadata["config"]
            summaries.append(
                {
                    "name": name,
                    **{key: config.get(key) for key in ("task", "model", "preset", "steps")},
                    **{key: latest.get(key) for key in metrics},
                    "updated": _modified(run / "metrics.jsonl") or _modified(run / "run.json"),
                    "finished": finished,
                    "parameters": metadata.get("parameters"),
                }
            )
        return sorted(summaries, key=lambda run: float(run["updated"]), reverse=True)

    def details(self, name: str, after: int = 0) -> Json | None:
        """Return a run's configuration and the metrics from byte `after` on; None if it is unreadable.

        `next` is the `after` of the next call. `restarted` means that no line starts at that byte, as
        training has gone back to a checkpoint: then all metrics are returned.
        """
        run = self.run_dirs().get(name)
        if run is None or (contents := self._read_run(run)) is None:
            return None
        metadata, _, finished = contents
        data = self._read(run / "metrics.jsonl")
        restarted = bool(after) and data[after - 1 : after] != b"\n"
        start, end = 0 if restarted else after, data.rfind(b"\n") + 1
        return {
            "name": name,
            "config": metadata["config"],
            "metrics": [*_json_lines(data[start:end])],
            "next": end,
            "finished": finished,
            **({"restarted": True} if restarted else {}),
        }

    def ladder(self) -> Json:
        """Return the rows of the newest ladder, and every rung with its module's docstring."""
        rungs = {
            name: {
                "name": name,
                **{
                    key: getattr(model, key)
                    for key in ("chapter", "year", "paper", "idea", "equation")
                },
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
        """Return the name of a ladder's folder and its rows; runs/ladder takes precedence."""
        default = self.folder / "ladder" / "ladder.json"
        files = self._find("ladder.json", "*/ladder.json")
        for file in sorted(files, key=lambda f: (f == default, _modified(f)), reverse=True):
            rows = _parse_json(self._read(file))
            if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
                return file.parent.name, rows
        return None, []

    def _read_run(self, run: Path) -> tuple[Json, Json, bool] | None:
        """Return run.json, the latest metrics, and whether the run has its final score.

        A ladder's rung has its score in rung.json. None if run.json is unreadable.
        """
        metadata = _parse_json(self._read(run / "run.json"))
        if not (isinstance(metadata, dict) and isinstance(metadata.get("config"), dict)):
            return None
        metrics = latest_metrics(run) if self._is_inside(run / "metrics.jsonl") else {}
        has_score = any(key.startswith("final_") for key in metrics)
        return metadata, metrics, has_score or (run / "rung.json").is_file()

    def _find(self, *patterns: str) -> list[Path]:
        """Return the files that match one of the patterns, relative to the folder."""
        files = (file for pattern in patterns for file in sorted(self.folder.glob(pattern)))
        return [file for file in files if self._is_inside(file)]

    def _is_inside(self, file: Path) -> bool:
        """Whether a file exists and is in the folder once links are resolved."""
        try:
            return file.is_file() and file.resolve().is_relative_to(self.folder)
        except OSError:
            return False

    def _read(self, file: Path) -> bytes:
        """Return a file's contents, or nothing if it is unreadable."""
        try:
            return file.read_bytes() if self._is_inside(file) else b""
        except OSError:
            return b""


def latest_metrics(run: Path) -> Json:
    """Return the latest value of each metric at the end of a run's metrics.jsonl."""
    latest: Json = {}
    with contextlib.suppress(OSError), (run / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
        for line in _json_lines(file.read()):
            latest |= line
    return latest


def _json_lines(data: bytes) -> Iterator[Json]:
    """Yield the JSON objects in complete lines."""
    for line in data.split(b"\n")[:-1]:
        values = _parse_json(line)
        if isinstance(values, dict):
            yield values


def _parse_json(data: bytes) -> Any:  # noqa: ANN401 (what JSON can hold)
    """Return a JSON value, with null for NaN and infinity; None if the data is not JSON."""

    def parse_float(number: str) -> float | None:
        return float(number) if math.isfinite(float(number)) else None

    try:
        return json.loads(data, parse_constant=lambda _: None, parse_float=parse_float)
    except (ValueError, RecursionError):
        return None


def _modified(file: Path) -> float:
    """Return a file's modification time in Unix seconds; 0 if it does not exist."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
