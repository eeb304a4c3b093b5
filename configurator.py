"""Turn a dataclass, config files and --key=value arguments into one checked, frozen object.

A field's default is the option's default, its annotation says what the option accepts, and the
comment behind it is what --help prints:

    @dataclass(frozen=True)
    class Options:
        batch_size: int = 12  # sequences in one forward pass

    config = configure(Options)    # python script.py config/big.py --batch_size=64

Arguments apply from left to right. A config file is Python that assigns to option names. The file
sees the current values; names of its own begin with an underscore. In a text option, ~/ at the
start is the home folder, and a value of nothing but \\n is a line break.
"""

import ast
import difflib
import os
import re
import shutil
import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"error: this is Python {sys.version.split()[0]}; use Python 3.11 or newer")

import types
import typing
from dataclasses import fields
from inspect import getsource
from pathlib import Path
from textwrap import dedent, fill


class UserError(ValueError):
    """A mistake that the user can correct. One line: the thing, its value, and what to do."""


def configure(cls: type, argv: list[str] | None = None):
    """Return the `cls` made from `argv`, by default the command line. Mistakes exit with code 2."""
    argv = sys.argv[1:] if argv is None else argv
    if {"--help", "-h"} & set(argv):
        run(print, help_text(cls))
        sys.exit(0)
    try:
        return read_options(cls, argv)
    except (UserError, OSError) as error:  # OSError: the name of a config file is too long
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def run(main: typing.Callable, config) -> None:
    """Call main(config). Errors of the user or the system end in one line and exit code 1."""
    for stream in (sys.stdout, sys.stderr):  # a pipe on Windows would choose another encoding
        if hasattr(stream, "reconfigure"):  # a notebook's has none
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
        sys.exit(f"error: {one_line(error)}")  # to stderr, with code 1


def one_line(error: Exception | str) -> str:
    """Return the message of `error`, or a text, without line breaks."""
    return " ".join(str(error).split())


def quote(path) -> str:
    """Return a path as one types it in a command: in quotes if it has spaces or the like."""
    return f'"{path}"' if re.search(r"[^\w./:\\+@=-]", str(path)) else str(path)


def check_range(options, low: float, high: float, *names: str) -> None:
    """Raise UserError if one of these fields is below `low` or above `high`. None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{name}={value} must be at least {low:,} and at most {high:,}")


def read_options(cls: type, argv: list[str]):
    """Return the dataclass `cls` made from `argv`. Raises UserError on a mistake."""
    accepted = {name: alternatives(hint) for name, hint in typing.get_type_hints(cls).items()}
    values = {field.name: field.default for field in fields(cls)}
    arguments = list(argv)
    while arguments:
        arg = arguments.pop(0)
        if not arg.startswith("-"):
            values |= read_config_file(arg, values, accepted)
            continue
        name, equals, text = arg.removeprefix("--").partition("=")
        kinds = accepted.get(name, [bool])
        value = "".join(arguments[:1])  # as in --top_k 5; behind a flag there may be a config file
        is_value = value and not value.startswith("--") and not value.endswith(".py")
        if not equals and is_value:
            equals, text = "=", arguments.pop(0)
        if not equals and bool not in kinds:
            raise UserError(f"{arg} needs a value, as in --{name}={values[name]!r}")
        values[name] = check(name, parse(text, kinds) if equals else True, accepted, arg)
    return cls(**values)


def read_config_file(path: str, values: dict, accepted: dict) -> dict:
    """Run the config file at `path`, which sees `values`, and return its assignments."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file; options begin with --")
    if Path(path).suffix != ".py":
        raise UserError(f"{path}: a config file is Python, as n_layer = 4; its name ends in .py")
    namespace = {**values, "__name__": "config", "__file__": path}
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
        exec(compile(tree, path, "exec"), namespace)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: {type(error).__name__}: {one_line(error)}") from error
    if names := [ast.unparse(n.target) for n in tree.body if isinstance(n, ast.AnnAssign)]:
        raise UserError(f"{path}: write {names[0]} = ... instead of a colon")
    return {
        name: check(name, value, accepted, path)
        for name, value in namespace.items()
        if not (name.startswith("_") or isinstance(value, types.ModuleType) or callable(value))
    }


def alternatives(annotation) -> list:
    """Return the types and values that an annotation allows: bool | Literal["auto"] has two."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return list(parts)
    return [kind for part in parts for kind in alternatives(part)] or [annotation]


def parse(text: str, kinds: list):
    """Return the value that `text` stands for: a Python literal, or the text itself."""
    if re.fullmatch(r"(\\n)+", text):  # as --help prints a line break
        return text.replace(r"\n", "\n")
    try:
        literal = {"true": "True", "false": "False"}.get(text, text)
        return text if kinds == [str] else ast.literal_eval(literal)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def check(name: str, value, accepted: dict, where: str):
    """Return `value` if option `name` accepts it; an int becomes a float where one is expected."""
    if name not in accepted:
        near = difflib.get_close_matches(name, accepted, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists all options"
        if name.replace("_", "-") == "local-rank":
            hint = "start with torchrun instead of torch.distributed.launch"
        elif not where.startswith("-"):
            hint += "; begin a name of your own with _"
        raise UserError(f"{where}: there is no option {name!r}; {hint}")
    kinds = accepted[name]
    if type(value) is int and float in kinds:
        value = float(value)
    if type(value) is str and value.startswith(("~/", "~\\")):
        value = os.path.expanduser(value)
    is_finite = type(value) is not float or abs(value) < float("inf")
    if value in kinds or (type(value) in kinds and is_finite):
        return value
    names = {int: "an integer", float: "a number", str: "text", bool: "True or False"}
    names[types.NoneType] = "None"
    expected = " or ".join(names.get(kind, repr(kind)) for kind in kinds)
    raise UserError(f"{where}: {name} is {value!r} but must be {expected}")


def help_text(cls: type) -> str:
    """Return each option with its default and comment; a comment alone on a line is a title."""
    width = max(60, shutil.get_terminal_size().columns)
    program = " ".join(sys.orig_argv[1 : 1 - len(sys.argv)])  # train.py, or -m tools.preflight
    lines = [cls.__doc__, "", f"usage: python {program} [config.py ...] [--option=value ...]"]
    hints = typing.get_type_hints(cls)
    source = "".join(dedent(getsource(c)) for c in reversed(cls.__mro__[:-1]))  # bases first
    for name, comment in re.findall(r"^    (?:(\w+): .+  )?# (.+)$", source, re.MULTILINE):
        if name:
            option = f"--{name}={getattr(cls, name)}".replace("\n", r"\n")
            kinds = alternatives(hints[name])
            choices = ["True, False"] * (bool in kinds) + [k for k in kinds if type(k) is str]
            comment += f" ({', '.join(choices)})" * (len(choices) > 1)
            lines.append(fill(f"  {option:38} {comment}", width, subsequent_indent=" " * 41))
        else:
            lines += ["", f"{comment}:"]
    return "\n".join(lines)
