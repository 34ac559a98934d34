"""Datasets of the Hugging Face hub, downloaded or streamed."""

import contextlib
import functools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa

from training.data.corpus import TextChunk
from training.data.files import error_cause, error_reason
from training.data.rows import SAMPLE_ROWS, RowReader, read_rows, table_values
from training.data.sources import DatasetSplits, ReadInterrupted, ReadReport, Source
from training.hub import check_hub_is_reachable, remove_damaged

# huggingface_hub tries again by itself; by default `datasets` would try that twenty times.
datasets.config.STREAMING_OPEN_MAX_RETRIES = datasets.config.STREAMING_READ_MAX_RETRIES = 1

SHUFFLE_SEED = 0
"""The order of a shuffled stream is always the same, so that its tokens are found in the cache."""


def open_hub_dataset(source: Source, rows: RowReader) -> DatasetSplits:
    """Return a dataset of the hub; it is downloaded when it is first read.

    Raises:
        ValueError: The hub cannot be reached, or has no such dataset, configuration or text.
    """
    name = source.data
    builder = _load_builder(name, source.config, source.revision)
    described = [source.config, source.revision and f"revision {source.revision}"]

    @functools.cache
    def load(split: str) -> datasets.IterableDataset | datasets.Dataset:
        if source.streaming:
            stream = builder.as_streaming_dataset(split=split)
            size = source.shuffle_buffer
            return stream.shuffle(SHUFFLE_SEED, buffer_size=size) if size else stream
        _download(builder)
        return builder.as_dataset(split=split)

    def tables(split: str) -> Iterator[pa.Table]:
        try:
            yield from load(split).with_format("arrow").iter(batch_size=SAMPLE_ROWS)
        except Exception as error:
            cause = error_cause(error)
            if isinstance(cause, OSError) and cause.errno:  # such as a full disk
                raise cause from error
            raise ReadInterrupted(f"{name}: {error_reason(error)}") from error

    report = ReadReport()

    def read(split: str) -> Iterator[TextChunk]:
        location = f"{name}, split {split}"
        return read_rows(table_values(tables(split), rows, location), rows, location, report)

    splits = map(str, builder.config.data_files or builder.info.splits or ())
    return DatasetSplits(
        splits={split: functools.partial(read, split) for split in splits},
        identity=["hub", name, builder.config.name, builder.hash],
        name=name + (f" ({', '.join(filter(None, described))})" if any(described) else ""),
        report=report,
    )


def _load_builder(name: str, config: str | None, revision: str | None) -> datasets.DatasetBuilder:
    """Return the builder of a hub dataset, which knows its files but has downloaded none."""
    load = functools.partial(datasets.load_dataset_builder, name, config, revision=revision)
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        try:
            check_hub_is_reachable()
        except ValueError as error:
            raise ValueError(
                f"{name} is not a local file or folder, and {error} to look for it: give a local file "
                "or folder, or set HF_HUB_OFFLINE=1 if it has been downloaded before"
            ) from None
    try:
        builder = load()
        # By default `datasets` makes each line a document, without its end; here a file is one.
        return builder if builder.name != "text" else load(sample_by="document")
    except datasets.exceptions.DatasetNotFoundError as error:
        if str(error).startswith("Revision"):
            raise ValueError(
                f"{name} has no revision {revision!r}: --data-revision is a branch, a tag or a commit"
            ) from None
        if "gated" in str(error):
            raise ValueError(
                f"{name} is a gated dataset: accept its terms on its page, then `hf auth login`"
            ) from None
        raise ValueError(
            f"{name}: no such file or folder, and the hub has no dataset of that name "
            "that you have access to; for a private one `hf auth login`, or set HF_TOKEN"
        ) from None
    except (
        datasets.exceptions.DataFilesNotFoundError,
        datasets.data_files.EmptyDatasetError,
    ) as error:
        raise ValueError(f"{name}: no text in this dataset: {error_reason(error)}") from None
    except ConnectionError as error:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            raise ValueError(f"{name}: {error_reason(error)}") from error
        raise ValueError(
            f"{name} is not in the cache, and HF_HUB_OFFLINE prevents a download: unset it, "
            "or give a local file or folder as --data"
        ) from None
    except Exception as error:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            with contextlib.suppress(Exception):
                return load(sample_by="document")
        if match := re.search(r"(?:[Aa]vailable[^\[]*)(\[.*?\])", str(error)):
            raise ValueError(
                f"{name} has several configurations: --data-config can be one of {match[1]}"
            ) from None
        raise ValueError(f"{name}: {error_reason(error)}") from error


def _download(builder: datasets.DatasetBuilder) -> None:
    """Download a dataset that is not in the cache; a ValueError if the hub sent other files than it lists."""
    is_new = not Path(builder.cache_dir).exists()
    try:
        builder.download_and_prepare()
    finally:
        damaged = ""
        if is_new:
            with contextlib.suppress(Exception):  # The hub may be gone.
                damaged = remove_damaged(builder.repo_id, builder.hash, "dataset")
        if damaged:
            shutil.rmtree(builder.cache_dir, ignore_errors=True)
            raise ValueError(damaged)
