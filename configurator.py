"""Turn a dataclass, config files and --key=value arguments into one checked, frozen object.

The dataclass is the whole interface. A field's default is the option's default, its annotation says
what the option accepts, and the comment behind it is what --help prints:

    @dataclass(frozen=True)
    class Options:
        batch_size: int = 12  # sequences in one forward pass

    config = configure(Options)    # python script.py config/big.py --batch_size=64

Arguments apply from left to right. A config file is Python that assigns to option names. It sees
their current values; its own names begin with an underscore.
"""

import ast
import difflib
import os
import re
import shutil
import sys
import types
import typing
from dataclasses import fields
from inspect import getsource
from pathlib import Path
from textwrap import dedent, fill


class UserError(ValueError):
    """A mistake that the user can correct. One line: the thing, its value, and what to do."""


def configure(cls: type, argv: list[str] | None = None):
    """Return the dataclass `cls` made from `argv`, by default the command line.

    Exits with code 0 after --help, and with one line and code 2 on a mistake.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(cls))
        sys.exit(0)
    try:
        return read_options(cls, argv)
    except (UserError, OSError) as error:  # OSError: the name of a config file is too long
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def explain_missing_package(kind: type, error: BaseException, traceback) -> None:
    """Print one line instead of a traceback if a package is not installed."""
    if kind is not ModuleNotFoundError:
        return sys.__excepthook__(kind, error, traceback)
    print(f"error: {error}; run: pip install -r requirements.txt", file=sys.stderr)


sys.excepthook = explain_missing_package  # scripts import this file before they import a package


def run(main: typing.Callable, config) -> None:
    """Call main(config). Errors of the user or the system end in one line and exit code 1."""
    for stream in (sys.stdout, sys.stderr):  # a pipe on Windows would choose another encoding
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        main(config)
        sys.stdout.flush()
    except BrokenPipeError:  # the program that reads our output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)


def one_line(error: Exception) -> str:
    """Return the message of `error` without line breaks."""
    return " ".join(str(error).split())


def check_range(options, low: float, high: float, *names: str) -> None:
    """Raise UserError if one of these fields is below `low` or above `high`. None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{name}={value} must be at least {low:,} and at most {high:,}")


def read_options(cls: type, argv: list[str]):
    """Return the dataclass `cls` made from `argv`. Raises UserError on a mistake."""
    accepted = typing.get_type_hints(cls)
    values = {field.name: field.default for field in fields(cls)}
    for arg in argv:
        if not arg.startswith("-"):
            values |= read_config_file(arg, values, accepted)
            continue
        name, equals, text = arg.removeprefix("--").partition("=")
        if not equals and bool in alternatives(accepted.get(name)):
            text = "True"
        elif not equals and name in accepted:
            raise UserError(f"{arg} needs a value, as in --{name}={values[name]}")
        values[name] = check(name, parse(text, accepted.get(name)), accepted, arg)
    return cls(**values)


def read_config_file(path: str, values: dict, accepted: dict) -> dict:
    """Run the config file at `path`, which sees `values`, and return its assignments."""
    if not Path(path).is_file():
        hint = suggest(path, map(str, Path(path).parent.glob("*.py")), "options begin with --")
        raise UserError(f"{path}: no such config file; {hint}")
    namespace = {**values, "__name__": "config", "__file__": path}
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), namespace)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: {type(error).__name__}: {one_line(error)}") from error
    return {
        name: check(name, value, accepted, path)
        for name, value in namespace.items()
        if not (name.startswith("_") or isinstance(value, types.ModuleType) or callable(value))
    }


def parse(text: str, annotation):
    """Return the value that `text` stands for: a Python literal, or the text itself."""
    if annotation is str:
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def alternatives(annotation) -> tuple:
    """Return the types that an annotation allows: int | None -> (int, NoneType); int -> (int,)."""
    is_literal = typing.get_origin(annotation) is typing.Literal
    return (annotation,) if is_literal else typing.get_args(annotation) or (annotation,)


def check(name: str, value, accepted: dict, where: str):
    """Return `value` if option `name` accepts it; an int becomes a float where only that fits."""
    if name not in accepted:
        hint = suggest(name, accepted, "--help lists all options")
        raise UserError(f"{where}: there is no option {name!r}; {hint}")
    if type(value) is int and abs(value) >= 1 << 63:
        value = "a number of 64 bits or more"
    if "\0" in str(value):  # no path has one
        raise UserError(f"{where}: {name} has a NUL character")
    expected = []
    for kind in alternatives(accepted[name]):
        if kind is float and type(value) is int:
            value = float(value)
        if typing.get_origin(kind) is typing.Literal:
            if value in typing.get_args(kind):
                return value
            expected += map(repr, typing.get_args(kind))
        elif type(value) is kind and (kind is not float or abs(value) < float("inf")):
            return value
        else:
            names = {int: "an integer", float: "a number", str: "text", bool: "True or False"}
            expected.append(names.get(kind, "None"))
    raise UserError(f"{where}: {name} is {value!r} but must be {' or '.join(expected)}")


def suggest(name: str, names: typing.Iterable[str], otherwise: str) -> str:
    """Return "did you mean 'NAME'?" with the most similar of `names`, or `otherwise`."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def help_text(cls: type) -> str:
    """Return each option with its default and comment; a comment alone on a line is a title."""
    width = max(60, shutil.get_terminal_size().columns)
    script = Path(sys.argv[0])
    program = f"-m tools.{script.stem}" if script.parent.name == "tools" else script.name
    lines = [cls.__doc__, "", f"usage: python {program} [config.py ...] [--option=value ...]"]
    for line in dedent(getsource(cls)).splitlines():
        if option := re.fullmatch(r"    (\w+): .+?  # (.+)", line):
            default = str(getattr(cls, option[1]))
            default = default if default.isprintable() else repr(default)
            line = f"  {f'--{option[1]}={default}':38} {option[2]}"
            lines.append(fill(line, width, subsequent_indent=" " * 41, break_on_hyphens=False))
        elif title := re.fullmatch(r"    # (.+)", line):
            lines += ["", title[1] + ":"]
    return "\n".join(lines)
