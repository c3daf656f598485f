"""What every command does: flags from a dataclass, and what the user must correct said in one sentence."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a full disk

NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # in errors of torch


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it and the fix. Shown without a traceback."""

    def __init__(self, message: str):
        if message.startswith("Caught InputError "):  # by a data loader, which puts its worker's traceback before it
            message = message.split(f"\n{__name__}.InputError: ")[-1].strip()
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))  # input may hold anything


def refuse(conflicts: Iterable[tuple[object, str]]) -> None:
    """Raises InputError for the first of (is wrong, what to do about it) that is wrong."""
    for wrong, message in conflicts:
        if wrong:
            raise InputError(message)


def run_command(main: Callable[[], Any]) -> Any:
    """Run a command's main function; what the user must correct is said in one sentence, with exit code 2."""
    try:
        return main()
    except InputError as error:
        message = str(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # nobody reads what is printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if not (message := explain(error)):
            raise
    print(f"error: {message}", file=sys.stderr)  # on a line of its own: with the error, progress bars of main are gone
    sys.exit(2)  # as argparse does; in a multi-rank run every rank for itself


def explain(error: OSError) -> str:
    """What is wrong with a file, and what to do, in one sentence; empty for an error that names no file."""
    path = error.filename2 or error.filename
    if error.errno in NO_ROOM:
        text = f"{path or 'a file'} cannot be written ({error.strerror}): make room and run the same command again"
    elif path is not None:
        text = f"{path} cannot be used ({error.strerror}): correct the path or its permissions"
    else:
        return ""
    return str(InputError(text))


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory is exhausted, the machine's or the GPU's: Python and numpy say so by type, torch in words."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


def is_of_machine(error: Exception) -> bool:
    """Whether an error says nothing of what the user gave: memory is exhausted, or a GPU failed."""
    return is_out_of_memory(error) or "CUDA error" in str(error)


@contextmanager
def within_memory(fix: str) -> Iterator[None]:
    """Say in an InputError that memory is exhausted, and what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0].split(". ")[0] or "MemoryError"
        raise InputError(f"memory is exhausted ({reason}): {fix}") from error


def show(text: str) -> None:
    """Print to standard output; what it cannot encode is escaped, since input may hold any character."""
    if sys.stdout is None:  # closed by the caller
        return
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


class FlagErrors:
    """Mixed into an argument parser: raises InputError for flags that do not fit."""

    def parse_known_args(self, args: list[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As the parser's own, but refuses a ~/ that the shell left as it is: a folder called ~ would be made."""
        for argument in sys.argv[1:] if args is None else args:
            name, _, value = argument.partition("=")
            if value.startswith("~/"):
                raise InputError(f"{argument}: shells do not expand ~ there; write {name}=$HOME{value[1:]}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Instead of printing the usage and leaving."""
        raise InputError(f"{message}; `{self.prog} --help` lists the flags")


class Parser(FlagErrors, argparse.ArgumentParser):
    """For commands whose flags are not those of a dataclass; the first line of `about` describes the command."""

    def __init__(self, command: str, about: str):
        super().__init__(prog=command, description=about.partition("\n")[0], allow_abbrev=False)

    def parse_known_args(self, args: list[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As FlagErrors', for names of flags with dashes too, as a dataclass's have them."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args(list(map(underscored, given)), namespace)


def underscored(argument: str) -> str:
    """An argument whose name, where it is a flag, has underscores for dashes."""
    name, equals, value = argument.partition("=")
    return (f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name) + equals + value


@dataclass(frozen=True)
class Limit:
    """What the value of a flag must satisfy, as part of the type of its field."""

    holds: Callable[[Any], bool]
    demand: str


AT_LEAST_0 = Limit(lambda value: 0 <= value < 2**63, "must be at least 0 and below 2^63")
Count = Annotated[int, Limit(lambda value: 1 <= value < 2**63, "must be at least 1 and below 2^63")]
Size = Annotated[int, Limit(lambda value: 1 <= value < 2**31, "must be at least 1 and below 2^31")]
Few = Annotated[int, Limit(lambda value: 1 <= value <= 2**16, "must be at least 1, at most 65536")]
Natural = Annotated[int, AT_LEAST_0]
NotNegative = Annotated[float, AT_LEAST_0]
Positive = Annotated[float, Limit(lambda value: 0 < value < 2**63, "must be above 0 and below 2^63")]
Share = Annotated[float, Limit(lambda value: 0 <= value <= 1, "must lie in [0, 1]")]
Decay = Annotated[float, Limit(lambda value: 0 <= value < 1, "must lie in [0, 1)")]
Side = Annotated[
    int, Limit(lambda value: 8 <= value <= 2**13 and value % 8 == 0, "must be a multiple of 8, at most 8192")
]


def check_limits(flags: Any) -> None:
    """Raises InputError for the first field of a dataclass instance, None excepted, that its type does not allow."""
    for name, kind in get_type_hints(type(flags), include_extras=True).items():
        value = getattr(flags, name)
        for part in (kind, *get_args(kind)):  # the members, if it is a union
            for limit in getattr(part, "__metadata__", ()):
                if value is not None and not limit.holds(value):
                    raise InputError(f"--{name} {limit.demand}, got {value}")


def flag(default: Any, text: str) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": text})


def parse_flags(cls: type, command: str, about: str, arguments: list[str] | None = None) -> Any:
    """An instance of the dataclass `cls` from arguments (sys.argv by default); InputError for what does not fit.

    The first line of `about` describes the command.
    """
    from transformers import HfArgumentParser  # slow, and commands without it use Parser

    class DataclassParser(FlagErrors, HfArgumentParser):
        pass

    parser = DataclassParser(cls, prog=command, description=about.partition("\n")[0], allow_abbrev=False)
    _, unknown = parser.parse_known_args(arguments)
    if unknown:  # before what is missing is complained of
        parser.error(f"unknown flag {unknown[0]}")
    return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)[0]


def parse_assignments(texts: Sequence[str], flag: str) -> dict[str, str]:
    """{name: value} of NAME=VALUE texts; raises InputError for one without name or equals sign, and for names twice."""
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name.strip() and equals):
            raise InputError(f"{flag} {text}: expected NAME=VALUE")
        if name in values:
            raise InputError(f"{flag} names {name} twice: give it once")
        values[name] = value
    return values
