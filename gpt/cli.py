"""Command lines of gpt, training and serving: parsing, and errors in one line.

A command is a dataclass: its fields are the options, its docstrings the help texts, and calling
it runs it. tyro turns the fields into a command line.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, Union

import torch
import tyro
from tyro import MISSING_NONPROP
from tyro.conf import Positional, arg, subcommand

EXIT_USAGE_ERROR = 2

Command = Callable[[], None]

# Optional options: their help texts say what None means, in place of "(default: None)".
OptionalText = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
OptionalInt = Annotated[int | None, arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")]
OptionalPath = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]
OptionalRun = Positional[Annotated[str | None, arg(metavar="[RUN]", help_behavior_hint="")]]


def main(
    prog: str,
    description: str,
    commands: Mapping[str, Callable[..., Command]],
    arguments: Sequence[str] | None = None,
    defaults: Mapping[str, Command] | None = None,
    note: str = "",
) -> None:
    """Parse `arguments` (those of sys.argv if None) and run the command they select.

    Args:
        prog: What the user has typed before the arguments.
        description: What the commands are for.
        commands: Dataclasses and functions by the name of their command.
        arguments: The name of a command, and its options.
        defaults: Instances of commands, for defaults other than those of their classes.
        note: Ends each message about a user's mistake.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Texts hold characters that a terminal's encoding may lack; as Python does on stderr.
        sys.stdout.reconfigure(errors="backslashreplace")
    with reported_errors(prog, note):
        _parse(prog, description, commands, arguments, defaults)()
        sys.stdout.flush()


@contextlib.contextmanager
def reported_errors(prog: str, note: str = "") -> Iterator[None]:
    """Report a user's mistake in one line on standard error that ends with `note`, and exit with code 2.

    Set TINYGPT_TRACEBACK=1 to see the traceback instead.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader (`| head`) has exited. Python would report it again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        if os.environ.get("TINYGPT_TRACEBACK"):
            raise
        if isinstance(error, OSError) and error.filename and error.strerror:
            exit_with_error(prog, f"{error.filename}: {error.strerror}{note}")
        exit_with_error(prog, f"{error}{note}")
    except (MemoryError, RuntimeError) as error:
        # torch raises RuntimeError, with these words on a CPU.
        is_out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_out_of_memory and "can't allocate memory" not in str(error):
            raise
        if os.environ.get("TINYGPT_TRACEBACK"):
            raise
        exit_with_error(prog, f"not enough memory: choose smaller sizes ({error})")


def exit_with_error(prog: str, message: str) -> NoReturn:
    """Print one line on standard error and exit with code 2."""
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(EXIT_USAGE_ERROR)


def _parse(
    prog: str,
    description: str,
    commands: Mapping[str, Callable[..., Command]],
    arguments: Sequence[str] | None,
    defaults: Mapping[str, Command] | None = None,
) -> Command:
    """Return the selected command with its options; print tyro's errors in one line."""
    # Like tyro.extras.subcommand_cli_from_dict, which takes no defaults. A union has two elements.
    subcommands: list[Any] = [
        Annotated[Any, subcommand(name, constructor=command, default=default)]
        for name, command in commands.items()
        for default in [(defaults or {}).get(name, MISSING_NONPROP)]
    ]
    subcommands.append(Annotated[None, tyro.conf.Suppress])
    stderr, usage = io.StringIO(), io.StringIO()
    is_overview = list(sys.argv[1:] if arguments is None else arguments) in (["-h"], ["--help"])
    try:
        with contextlib.ExitStack() as streams:
            streams.enter_context(contextlib.redirect_stderr(stderr))
            if is_overview:
                streams.enter_context(contextlib.redirect_stdout(usage))
            choices: Any = Union[tuple(subcommands)]  # noqa: UP007 (made of a list)
            command: Any = tyro.cli(
                choices,
                prog=prog,
                description=description,
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
            return command
    except SystemExit as stop:
        # The list of all commands follows below; in the first line it would fit no terminal.
        print(re.sub(r"\{[\w,-]+\}", "COMMAND", usage.getvalue(), count=1), end="")
        if stop.code != EXIT_USAGE_ERROR:
            raise
    raise ValueError(_one_line(stderr.getvalue()))


def _one_line(box: str) -> str:
    """Return tyro's boxed error message as one line: the error and a similar option, if any."""
    _, _, body = box.partition("\n")  # without the title
    text = " ".join(re.sub(r"[│╭╮╰╯]|─{2,}|-{9,}", " ", body).split())
    text = re.sub(r"^Error parsing __tyro\S+ ", "", text)
    help_text = r" (?:Argument helptext|Arguments are applied|For full helptext|Perhaps you meant)"
    message = re.split(help_text, text)[0]
    similar = re.search(r"Perhaps you meant: (--\S+)", text)
    if " or misplaced" in message:  # an option of another command: it is known, but not here
        similar = None
        message = re.sub(r" \(applied to [^)]*\)", ",", message.replace(" or misplaced", ""))
    hint = f" (did you mean {similar[1]}?)" if similar else ""
    return f"{message.rstrip('.,')}{hint}; --help explains"
