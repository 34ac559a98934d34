"""Options from a configuration file and from the environment: what a command starts with.

Options on the command line win over these, because these only change its defaults. A value is
checked against the type of its option; the command checks ranges, as it does on the command line.
"""

import copy
import dataclasses
import json
import os
import shlex
import sys
import tomllib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import tyro

from gpt.checkpoint import did_you_mean

T = TypeVar("T")

PREFIX = "TINYGPT_"
OTHER_VARIABLES = {"TINYGPT_CACHE", "TINYGPT_TRACEBACK", "TINYGPT_SHARED"}
"""Environment variables that are no options; the last is one of the tests."""


class Setting(NamedTuple):
    """The value of an option, before it is checked."""

    origin: str
    """The file and its key, or the environment variable."""
    value: Any
    is_text: bool = False
    """Whether the value is text that spells a value of any type, as in the environment."""


Settings = dict[str, Setting]
"""Settings by the name of their option, such as `max-num-seqs`."""


class _Option(NamedTuple):
    field: str
    type: Any
    is_appended: bool
    """Whether each use of the option adds to a list."""


def _options(default: object) -> Iterator[tuple[str, _Option]]:
    """Yield the options that tyro makes of a dataclass, without nested ones, by name."""
    plain, annotated = (get_type_hints(type(default), include_extras=x) for x in (False, True))
    for field in dataclasses.fields(default):  # type: ignore[arg-type]
        metadata = get_args(annotated[field.name])[1:]
        if tyro.conf.Suppress in metadata or dataclasses.is_dataclass(plain[field.name]):
            continue
        names = [name for each in metadata if (name := getattr(each, "name", None))]
        option = (names or [field.name])[0].replace("_", "-")
        if option != "config":  # names the file that settings are read from
            is_appended = tyro.conf.UseAppendAction in metadata
            yield option, _Option(field.name, plain[field.name], is_appended)


def _nested(default: object) -> Iterator[tuple[str, Any]]:
    """Yield the dataclasses in the fields of a dataclass."""
    for field in dataclasses.fields(default):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(value := getattr(default, field.name)):
            yield field.name, value


def option_names(*defaults: object) -> list[str]:
    """Return the options of dataclasses and of those in their fields."""
    names: list[str] = []
    for default in defaults:
        names += [name for name, _ in _options(default)]
        names += option_names(*(value for _, value in _nested(default)))
    return names


def read_settings(path: Path, tables: Collection[str]) -> Settings:
    """Read a TOML file: options by name, with - or _, some of them in tables of these names.

    A file that is missing or no TOML, and an option that is there twice, are ValueErrors.
    """
    if path.suffix.lower() != ".toml" or not path.is_file():
        raise ValueError(f"--config {path}: no such file; expected the path of a .toml file")
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error
    entries: list[tuple[str, str, Any]] = []
    for key, value in content.items():
        if key in tables and isinstance(value, dict):
            entries += [(name, f"[{key}] {name}", entry) for name, entry in value.items()]
        else:
            entries.append((key, key, value))
    settings: Settings = {}
    for name, key, value in entries:
        option = name.replace("_", "-")
        if option in settings:
            raise ValueError(f"{settings[option].origin} is there twice; {key} is the second")
        settings[option] = Setting(f"{path}: {key}", value)
    return settings


def read_environment(prog: str, options: Sequence[str]) -> Settings:
    """Return the settings of TINYGPT_ variables; warn of those that name no option."""
    variables = {PREFIX + option.upper().replace("-", "_"): option for option in options}
    given = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    if unknown := sorted(given.keys() - variables.keys() - OTHER_VARIABLES):
        known = [name.removeprefix(PREFIX) for name in variables]
        hints = [name + did_you_mean(name.removeprefix(PREFIX), known) for name in unknown]
        print(f"{prog}: warning: no option is set by {', '.join(hints)}", file=sys.stderr)
    return {
        option: Setting(name, given[name], is_text=True)
        for name, option in variables.items()
        if name in given
    }


def check(setting: Setting, annotation: Any) -> Any:  # noqa: ANN401
    """Return the value of a setting as the type of its option; a ValueError says what is expected."""
    from pydantic import TypeAdapter, ValidationError  # takes long to import

    adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    value = setting.value
    if value == "None" and type(None) in get_args(annotation):  # as on the command line
        return None
    try:
        if get_origin(annotation) is tuple and isinstance(value, str):
            value = shlex.split(value) if setting.is_text else [value]
        if setting.is_text:
            return adapter.validate_python(value)
        # JSON has arrays and strings for what Python has tuples and paths for.
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
    except (TypeError, ValueError) as error:  # a date; a quotation mark that is not closed
        reason = str(error)
    if setting.is_text and setting.value.startswith("tcp://"):
        reason += "; Kubernetes sets it for a service named tinygpt: see docs/deployment.md"
    raise ValueError(f"{setting.origin} = {str(setting.value)[:80]!r}: {reason}")


def apply(settings: Settings, arguments: Sequence[str], *defaults: Any) -> list[Any]:  # noqa: ANN401
    """Return copies of dataclasses with the settings of their options.

    A setting that none of them has is a ValueError. Their `__post_init__` is not called: options on
    the command line may still change what a setting contradicts.
    """
    typed = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    known = option_names(*defaults)
    for name, setting in settings.items():
        if name not in known:
            file, _, key = setting.origin.rpartition(": ")
            hint = did_you_mean(name, known)
            raise ValueError(f"{file}: no option is named {key!r}{hint}; --help lists the options")
    return [_apply(settings, typed, default) for default in defaults]


def _apply(settings: Settings, typed: set[str], default: T) -> T:
    result = copy.copy(default)
    for name, (field, annotation, is_appended) in _options(default):
        if name not in settings:
            continue
        value = check(settings[name], annotation)
        if isinstance(value, bool) and {f"--{name}", f"--no-{name}"} & typed:
            value = f"--no-{name}" in typed  # tyro has only the flag that changes the default
        if not (is_appended and f"--{name}" in typed):
            object.__setattr__(result, field, value)
    for field, value in _nested(default):
        object.__setattr__(result, field, _apply(settings, typed, value))
    return result


def find_option(arguments: Sequence[str], option: str) -> str | None:
    """Return the last value of an option among arguments that are not parsed yet; None without it."""
    value = None
    for index, argument in enumerate(arguments):
        name, equals, after = argument.partition("=")
        if name == option:
            value = after if equals else "".join(arguments[index + 1 : index + 2])
    return value


def describe_sources(settings: Settings) -> str:
    """Return where settings come from, as a note to an error message."""
    origins = [setting.origin.partition(": ")[0] for setting in settings.values()]
    return f" (options also come from {', '.join(dict.fromkeys(origins))})" if origins else ""
