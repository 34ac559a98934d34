"""Resolve a source: the standard library, a file, a folder or a hub dataset, in this order."""

import platform
import re
import sysconfig
from dataclasses import replace
from pathlib import Path

from training.data import hub
from training.data.files import SUPPORTED_FILES, detect_format, open_files, open_folder
from training.data.rows import RowReader
from training.data.sources import DatasetSplits, Source
from training.data.splits import HOLD_OUT_EVERY, hash_split


def find_dataset(source: Source, rows: RowReader) -> DatasetSplits:
    """Find the dataset of a source; a ValueError tells a mistyped path from an unknown dataset."""
    data = source.data
    path = Path(data).expanduser()
    if data == "stdlib":
        dataset = _standard_library(source, rows)
    elif data and path.is_file():
        if not (file_format := detect_format(path)):
            raise ValueError(f"{data}: unsupported file type; expected {SUPPORTED_FILES}")
        dataset = open_files(source, rows, file_format, {"train": [str(path.resolve())]})
    elif data and path.is_dir():
        dataset = open_folder(source, rows, path.resolve())
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", data) or detect_format(path):
        raise ValueError(f"{data}: no such file or folder")
    else:
        return _select_split(source, hub.open_hub_dataset(source, rows))
    if source.config is not None:
        raise ValueError(f"--data-config is only for hub datasets; {data} has no configurations")
    return _select_split(source, dataset)


def _select_split(source: Source, dataset: DatasetSplits) -> DatasetSplits:
    """Return the dataset with only the split that the source names, if it names one."""
    if source.split is None:
        return dataset
    if source.split not in dataset.splits:
        names = ", ".join(dataset.splits)
        raise ValueError(
            f"{source.data} has no split {source.split!r}; --data-split can be {names}"
        )
    return replace(dataset, splits={source.split: dataset.splits[source.split]})


def _standard_library(source: Source, rows: RowReader) -> DatasetSplits:
    """Return the sources of the running Python's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    excluded = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if excluded.isdisjoint(relative.parts) and _is_utf8(path):
            splits[hash_split(relative.as_posix())].append(str(path))
    if not all(splits.values()):
        raise ValueError(f"the standard library's sources are not in {root}: give text as --data")
    return replace(
        open_files(source, rows, "text", splits),
        name=f"standard library of Python {platform.python_version()}",
        validation_rule=f"one file in {HOLD_OUT_EVERY}, by a hash of its path",
    )


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True
