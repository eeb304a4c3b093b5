"""Options: a dataclass, config files and --key=value arguments become one checked, frozen object.

The dataclass is the whole interface. A field's default is the option's default, its annotation is
what the option accepts, and the comment behind it is what --help prints:

    @dataclass(frozen=True)
    class Options:
        batch_size: int = 12  # sequences in one forward pass

    config = configure(Options)    # python script.py config/big.py --batch_size=64

Arguments apply from left to right. A config file is Python that assigns to option names; it sees
their current values, and its own helper names begin with an underscore.
"""

import ast
import difflib
import io
import math
import os
import sys
import tokenize
import types
import typing
from dataclasses import fields
from inspect import getsource
from pathlib import Path
from textwrap import dedent


class UserError(ValueError):
    """Something that the user can put right. Its one line names the thing, the value and the remedy."""


def configure(cls: type, argv: list[str] | None = None):
    """Return an instance of the dataclass `cls` made from `argv` (by default the command line).

    Ends the process with exit code 0 after --help, and with one line and exit code 2 on a mistake.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(cls))
        sys.exit(0)
    try:
        return read_options(cls, argv)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def run(main: typing.Callable, config) -> None:
    """Call `main(config)`; what the user or the system did wrong ends in one line and exit code 1."""
    for stream in (sys.stdout, sys.stderr):  # a pipe on Windows would choose another encoding
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        main(config)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def read_options(cls: type, argv: list[str]):
    """`configure` without its exits: raises UserError."""
    accepted = typing.get_type_hints(cls)
    values = {field.name: field.default for field in fields(cls)}
    for arg in argv:
        if not arg.startswith("-"):
            values = read_config_file(arg, values, accepted)
            continue
        name, equals, text = arg.removeprefix("--").partition("=")
        check_name(name, accepted, arg)
        if equals:
            value = parse(text, accepted[name])
        elif bool in alternatives(accepted[name]):
            value = True
        else:
            raise UserError(f"{arg}: needs a value, as in --{name}={values[name]}")
        values[name] = check_value(name, value, accepted[name], arg)
    return cls(**values)


def read_config_file(path: str, values: dict, accepted: dict) -> dict:
    """Run the config file at `path` and return `values` with its assignments."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file; an option is written --name=value")
    namespace = {**values, "__name__": "config", "__file__": path}
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), namespace)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: {type(error).__name__}: {one_line(error)}") from error
    values = dict(values)
    for name, value in namespace.items():
        if name.startswith("_") or isinstance(value, types.ModuleType) or callable(value):
            continue
        check_name(name, accepted, path)
        values[name] = check_value(name, value, accepted[name], f"{path}: {name}")
    return values


def check_name(name: str, accepted: dict, where: str) -> None:
    if name not in accepted:
        near = difflib.get_close_matches(name, accepted, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists them all"
        raise UserError(f"{where}: there is no option {name!r}; {hint}")


def alternatives(annotation) -> tuple:
    """int | None -> (int, NoneType); int -> (int,)"""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def parse(text: str, annotation):
    """The value that `text` writes: a Python literal, or the text itself."""
    if annotation is str:
        return text
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def check_value(name: str, value, annotation, where: str):
    """Return `value` if `annotation` admits it; an int becomes a float where only that will do."""
    names = []
    for kind in alternatives(annotation):
        if typing.get_origin(kind) is typing.Literal:
            if value in typing.get_args(kind):
                return value
            names += map(repr, typing.get_args(kind))
            continue
        if type(value) is kind and not (kind is float and not math.isfinite(value)):
            return value
        if kind is float and type(value) is int and abs(value) < 1 << 1000:
            return float(value)
        names.append(
            {int: "an integer", float: "a number", str: "a string", bool: "True or False"}.get(
                kind, "None"
            )
        )
    raise UserError(f"{where}: {name} is {value!r} but must be {' or '.join(names)}")


def help_text(cls: type) -> str:
    """Every option with its default and its comment; a comment on its own line is a heading."""
    lines = [
        dedent(cls.__doc__).strip(),
        "",
        f"usage: python {Path(sys.argv[0]).name} [config.py ...] [--option=value ...]",
    ]
    defaults = {field.name: field.default for field in fields(cls)}
    name = None
    source = "".join(
        dedent(getsource(c)) for c in reversed(cls.__mro__[:-1])
    )  # inherited options first
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line, comment = token.line.strip(), token.string.lstrip("# ")
        if (
            token.type == tokenize.NAME
            and token.string in defaults
            and line.startswith(token.string + ":")
        ):
            name = token.string
        elif token.type == tokenize.COMMENT and line.startswith("#"):
            lines += ["", comment + ":"]
        elif token.type == tokenize.COMMENT and name in defaults:
            default = str(defaults.pop(name))
            lines.append(
                f"  {f'--{name}={default if default.isprintable() else repr(default)}':38} {comment}"
            )
    return "\n".join(lines)
