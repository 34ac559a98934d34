"""What the command lines of gpt, training and serving share: parsing, and one line for a mistake.

A command is a dataclass: its fields are the options, its docstrings the help, and
calling it does the work. tyro turns the fields into a command line.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130

Command = Callable[[], None]

MaybeText = Annotated[str | None, tyro.conf.arg(metavar="TEXT")]
MaybeInt = Annotated[int | None, tyro.conf.arg(metavar="INT")]
MaybePath = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
MaybeRun = tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="RUN")]]


def main(
    prog: str,
    description: str,
    commands: Mapping[str, Callable[..., Command]],
    arguments: Sequence[str] | None = None,
) -> None:
    """Parse `arguments` (sys.argv's when None) and call the command they choose.

    A mistake of the user's is one line and exit code 2.

    Set TINYGPT_TRACEBACK=1 to see where in the code a mistake was noticed.
    """
    try:
        command = _parse(prog, description, commands, arguments)
        command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader (`| head`) has gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        if os.environ.get("TINYGPT_TRACEBACK"):
            raise
        refuse(prog, str(error))


def refuse(prog: str, message: str) -> NoReturn:
    """Print one line on standard error and exit with code 2."""
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(EXIT_MISTAKE)


def _parse(
    prog: str,
    description: str,
    commands: Mapping[str, Callable[..., Command]],
    arguments: Sequence[str] | None,
) -> Command:
    """The chosen command with its options. tyro's boxed error message becomes one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            chosen: Any = tyro.extras.subcommand_cli_from_dict(
                dict(commands),
                prog=prog,
                description=description,
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
            return chosen
    except SystemExit as stop:
        if stop.code != EXIT_MISTAKE:
            raise
    refuse(prog, _one_line(complaint.getvalue()))


def _one_line(box: str) -> str:
    """What tyro says in a box under a title, as one line: the complaint and its suggestions."""
    _, _, body = box.partition("\n")
    text = re.sub(r"[│╭╮╰╯]", " ", body)
    complaint, *more = re.split("─+|Perhaps you meant:|For full helptext", text)
    complaint = re.sub(r"^\s*Error parsing __tyro\S+ ", "", complaint).strip().rstrip(".")
    meant = re.findall(r"\n\s*(--[a-z][\w-]*)", more[1]) if "Perhaps you meant" in text else []
    suggestion = f" (did you mean {' or '.join(dict.fromkeys(meant))}?)" if meant else ""
    there = re.search(r"Available subcommands: [\w, -]+", text)
    suggestion += f". {there[0].strip()}" if there else ""
    return f"{complaint}{suggestion}; --help lists what there is"
