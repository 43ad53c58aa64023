"""options.py: what a user says, on the command line or in a JSON file, checked in one place.

Options     A frozen dataclass names the options of a command, each with its help and its range. It
            becomes the command line, and it checks itself however it is made.
Files       Text and JSON are checked as they are read. A file is written whole or not at all.
"""

import argparse
import json
import os
import sys
from contextlib import suppress
from dataclasses import field, fields
from functools import cache
from pathlib import Path

MAX_TEXT = 2**20                       # characters of a line, bytes of a caption file
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
         dict: "an object"}


def option(default, help, low=-1e12, high=1e12, choices=()):
    """A dataclass field with its help text and its range (both ends included) or its choices."""
    return field(default=default, metadata={"help": help, "rule": (low, high, choices)})


def check_value(name, value, kind, low=-1e12, high=1e12, choices=()):
    """ValueError unless `value` is of the type `kind`, finite, in range and among the choices."""
    right = type(value) is kind or (kind is float and type(value) is int)
    rule = KINDS.get(kind, "a list")
    if kind in (int, float):
        right = right and low <= value <= high         # false for nan
        rule += f" from {low:g} to {high:g}"
    if choices:
        right = right and value in choices
        rule = "one of " + ", ".join(choices)
    if not right:
        raise ValueError(f"{name} {value!r:.80} must be {rule}")


def check_options(config):
    """Check every option of a frozen dataclass, in its __post_init__. Lists become tuples."""
    for item in fields(config):
        flag = "--" + item.name.replace("_", "-")
        kind = item.type
        values = [getattr(config, item.name)]
        if kind not in KINDS and isinstance(values[0], list | tuple):
            values = tuple(values[0])
            kind = kind.__args__[0]                    # the int of tuple[int, ...]
            object.__setattr__(config, item.name, values)
        for value in values:
            check_value(flag, value, kind, *item.metadata["rule"])


def add_options(parser, kind):
    """Add a flag for every option of the dataclass `kind`. An option not given sets nothing."""
    for item in fields(kind):
        settings = {"type": item.type}
        if item.type is bool:
            settings = {"type": true_or_false, "nargs": "?", "const": True}
        elif item.type is str:
            settings = {"type": os.path.expanduser}
        elif item.type not in KINDS:                   # tuple[int, ...] or tuple[str, ...]
            settings = {"type": item.type.__args__[0], "nargs": "*"}
        flags = ["--" + item.name.replace("_", "-")]
        if item.name == "timestep_shift":
            flags.append("--shift")
        help = f"{item.metadata['help']} (default: {item.default})".replace("%", "%%")
        choices = item.metadata["rule"][2] or None
        parser.add_argument(*flags, dest=item.name, default=argparse.SUPPRESS, help=help,
                            choices=choices, **settings)


def true_or_false(text):
    """The bool that a text on the command line stands for."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r:.80} must be true or false")
    return text.lower() == "true"


def given_options(options, kind):
    """{field: value} of the options of `kind` that were given on the command line."""
    names = {item.name for item in fields(kind)}
    return {name: value for name, value in vars(options).items() if name in names}


def read_options(kind, description, arguments=None, **presets):
    """The dataclass `kind` of a command line. presets: {name: {field: value}}; --name chooses one,
    and other options override it."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.set_defaults(preset={})
    add_options(parser, kind)
    for name, preset in presets.items():
        parser.add_argument(f"--{name}", action="store_const", const=preset, dest="preset",
                            help=str(preset).replace("%", "%%"))
    options = parser.parse_args(arguments)
    return kind(**options.preset | given_options(options, kind))


@cache
def note_once(text):
    """Tell the user something about a file, once however often the file is opened."""
    print(f"note: {text}", file=sys.stderr)


# ---- Files ---------------------------------------------------------------------------------------

def read_lines(path, errors="strict"):
    """The lines of a UTF-8 file, split at newlines only. "surrogateescape" keeps wrong bytes."""
    path = Path(path).expanduser()
    lines = []
    try:
        with open(path, encoding="utf-8-sig", errors=errors, newline="\n") as file:
            while line := file.readline(MAX_TEXT):
                if len(line) == MAX_TEXT:
                    raise ValueError(f"{path} line {len(lines) + 1} has over {MAX_TEXT} characters")
                lines.append(line.rstrip("\r\n"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; save it again as UTF-8") from None
    return lines


def read_json(file, kinds=None):
    """The object in a JSON file. kinds: {name: type} of what it must hold."""
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8-sig"))
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as problem:
        raise ValueError(f"{file} cannot be read as JSON ({problem}); fetch it anew") from None
    for name, kind in (kinds or {}).items():
        check_value(f"{file}: {name}", value.get(name), kind)
    return value


def write_json(file, value):
    """Write a value as JSON, and make its folder. A kill leaves the old file as it was."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(file, lambda partial: partial.write_text(text))


def write_atomically(file, write):
    """Call write(temporary path in the same folder), then rename: a kill or a full disk leaves the
    old file as it was. Only a regular file is replaced, and the new one keeps its mode."""
    file = Path(file)
    partial = file.with_name(f"{file.name[:40]}.{os.urandom(6).hex()}.partial")
    try:
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise OSError("it is a link or no regular file")
        partial.touch(exist_ok=False)                  # never through a link
        mode = (file if file.exists() else partial).stat().st_mode
        write(partial)
        partial.chmod(mode)                            # save_file leaves mode 600.
        partial.replace(file)
    except Exception as problem:                       # Each library raises its own kind.
        raise OSError(f"could not write {file} ({problem}); the old file is untouched") from None
    finally:                                           # Ctrl-C leaves nothing behind, too.
        with suppress(OSError):
            partial.unlink()
