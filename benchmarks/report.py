"""Shared by the benchmarks: machine info, median formatting, report files and common options."""

import argparse
import importlib.util
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gpt import cli
from gpt.checkpoint import RUNS, write_atomically
from gpt.device import cpu_info

Result = dict[str, Any]
"""Measurements by name, in types that JSON has."""


def machine_info() -> Result:
    """Return the date, hardware and library versions of a measurement."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "processor": cpu_info()["model name"],
        "cores": os.cpu_count(),
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{
            package: version(package) if is_installed(package) else None
            for package in ("transformers", "triton")
        },
    }


def is_installed(module: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def format_machine(machine: Result) -> str:
    """Format `machine_info` as one line."""
    gpu = f"{machine['gpu']} (CUDA {machine['cuda']}, triton {machine['triton']})"
    return (
        f"{machine['processor']}, {machine['cores']} cores, {gpu if machine['gpu'] else 'no GPU'}; Python "
        f"{machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}; "
        f"{machine['date']}."
    )


def format_median(values: Iterable[float | None], format_value: Callable[[float], str]) -> str:
    """Format the median of the known values, their range, and how many are known if not all are."""
    everything = list(values)
    known = sorted(value for value in everything if value is not None)
    if not known:
        return "–"
    text = format_value(statistics.median(known))
    if len(known) > 1:
        text += f" ({format_value(known[0])} to {format_value(known[-1])})"
    return text + f", {len(known)} of {len(everything)}" * (len(known) < len(everything))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table's lines: the first column is left-aligned, the others right-aligned."""
    header_line, *lines = [
        "|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in (header, *rows)
    ]
    return [header_line, "|---|" + "---:|" * (len(header) - 1), *lines]


def write(result: Result, tables: Sequence[str], output: Path) -> None:
    """Print the tables and the machine; write the result as JSON and, beside it, the tables as Markdown."""
    text = "\n".join([*tables, format_machine(result["machine"]) + "\n"])
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(result, indent=1) + "\n")
    write_atomically(output.with_suffix(".md"), text)
    print(f"\n{text}\n{output}, {output.with_suffix('.md')}")


def check_at_least(minimum: int, **options: int | None) -> None:
    """Raise a ValueError if an option is set to less than the minimum."""
    for name, value in options.items():
        if value is not None and value < minimum:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {minimum}, not {value}")


def add_common_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the options of every benchmark: where its report goes, and its number of threads."""
    parser.add_argument(
        "--output",
        type=Path,
        default=RUNS / "bench" / output,
        metavar="PATH",
        help="JSON, and a table beside it as .md (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default: 2")


def run_command(
    parser: argparse.ArgumentParser,
    benchmark: Callable[..., None],
    arguments: Sequence[str] | None,
) -> None:
    """Call the benchmark with the parsed options; a ValueError becomes one line and exit code 2."""
    options = parser.parse_args(arguments)
    try:
        benchmark(**vars(options))
    except ValueError as error:
        cli.exit_with_error(parser.prog, str(error))
