"""What the benchmarks share: their command lines, what they print and write, on which machine."""

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

Row = dict[str, Any]
"""Figures by name, as JSON has them."""


def machine() -> Row:
    """Where and when."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    installed = importlib.util.find_spec("transformers")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "processor": cpu_info()["model name"],
        "cores": os.cpu_count(),
        "card": card,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers") if installed else None,
    }


def described(where: Row) -> str:
    """The machine in a line."""
    return (
        f"{where['processor']}, {where['cores']} cores, {where['card'] or 'no card'}; Python "
        f"{where['python']}, torch {where['torch']}, transformers {where['transformers']}; "
        f"{where['date']}."
    )


def spread(values: Iterable[float | None], written: Callable[[float], str]) -> str:
    """The median of what is known, the least and the most, and how many are not known."""
    everything = list(values)
    known = sorted(value for value in everything if value is not None)
    if not known:
        return "–"
    text = written(statistics.median(known))
    if len(known) > 1:
        text += f" ({written(known[0])} to {written(known[-1])})"
    return text + f", {len(known)} of {len(everything)}" * (len(known) < len(everything))


def report(result: Row, tables: list[str], output: Path) -> None:
    """Print the tables with the machine below them, write JSON and, beside it, Markdown."""
    text = "\n".join([*tables, described(result["machine"]) + "\n"])
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(result, indent=1) + "\n")
    write_atomically(output.with_suffix(".md"), text)
    print(f"\n{text}\n{output}, {output.with_suffix('.md')}")


def add_common_options(parser: argparse.ArgumentParser, output: str) -> None:
    """What every benchmark asks: where its `report` goes, and how many threads it may use."""
    parser.add_argument(
        "--output",
        type=Path,
        default=RUNS / "bench" / output,
        metavar="PATH",
        help="JSON, and a table beside it as .md (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default: 2")


def command(
    parser: argparse.ArgumentParser,
    benchmark: Callable[..., None],
    arguments: Sequence[str] | None,
) -> None:
    """Run what the command line asks for; a mistake is one line and exit code 2."""
    options = parser.parse_args(arguments)
    try:
        benchmark(**vars(options))
    except ValueError as error:
        cli.exit_with_error(parser.prog, str(error))
