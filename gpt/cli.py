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

# Options that may be left out: their help says what then happens, not "(default: None)".
MaybeText = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
MaybeInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
MaybePath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
MaybeRun = tyro.conf.Positional[
    Annotated[Path | None, tyro.conf.arg(metavar="[RUN]", help_behavior_hint="")]
]


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
        if isinstance(error, OSError) and error.filename and error.strerror:
            refuse(prog, f"{error.filename}: {error.strerror}")
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
    """What tyro says in a box under a title, as one line: the complaint and what is like it."""
    _, _, body = box.partition("\n")
    message = " ".join(re.sub(r"[│╭╮╰╯]|─{2,}|-{9,}", " ", body).split())
    message = re.sub(r"^Error parsing __tyro\S+ ", "", message)
    ends = r" (?:Argument helptext|Arguments are applied|For full helptext|Perhaps you meant)"
    complaint = re.split(ends, message)[0]
    meant = re.search(r"Perhaps you meant: (--\S+)", message)
    if " or misplaced" in complaint:  # another command has this option: it is known, but not here
        meant = None
        complaint = re.sub(r" \(applied to [^)]*\)", ",", complaint.replace(" or misplaced", ""))
    hint = f" (did you mean {meant[1]}?)" if meant else ""
    return f"{complaint.rstrip('.,')}{hint}; --help explains"
