"""The command line: arguments in, exit codes out."""

import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from vamo_ft.arguments import Options, app

__all__ = ["main", "run"]

_INTERRUPTED = 130
_STOPPED = 75
_OF_A_CONNECTION = "connection"  # as training.heartbeat names it, of which this layer knows nothing


def main() -> NoReturn:
    """Runs the command that the process was started with."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 shows what it can
    code = run(sys.argv[1:], ends_process=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            if isinstance(stream, TextIOWrapper):
                stream.flush()
        except OSError:  # whoever read the output, such as `head`, is gone; the interpreter would complain at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if any(thread.name == _OF_A_CONNECTION for thread in threading.enumerate()):
        os._exit(code)  # one that came back from its library while the interpreter ends would abort the process
    sys.exit(code)


def run(arguments: Sequence[str], *, ends_process: bool = False) -> int:
    """Runs one command.

    Args:
        ends_process: the process ends with it, with the code that is returned.

    Returns:
        0 finished; 1 unexpected error; 2 usage, configuration or data; 3 diverged; 4 out of memory; 75 stopped with a
        checkpoint; 130 interrupted.
    """
    options = Options(ends_process=ends_process)
    try:
        code = app(_with_debug_first(arguments), prog_name="vamo-ft", standalone_mode=False, obj=options)
    except Exception as error:
        return _report(error, debug=options.debug, arguments=arguments)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except SystemExit as exit:
        if exit.code is None or isinstance(exit.code, int):
            return exit.code or 0
        _say(exit.code)
        return 1
    if code == _INTERRUPTED:
        _say("interrupted")
    return code if isinstance(code, int) else 0


def _with_debug_first(arguments: Sequence[str]) -> list[str]:
    """`--debug` belongs before the command; whoever is told to run again with it adds it at the end."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if "--debug" not in arguments[:end]:
        return list(arguments)
    others = [argument for argument in arguments[:end] if argument != "--debug"]
    return ["--debug", *others, *arguments[end:]]


def _report(error: Exception, *, debug: bool, arguments: Sequence[str]) -> int:
    _tell_launcher(error)
    if debug:
        _say("".join(traceback.format_exception(error)), one_line=False)
    code = getattr(error, "exit_code", None)
    if not isinstance(code, int):
        if not debug:
            what = ": ".join(filter(None, (type(error).__name__, _text(error))))
            _say(f"unexpected error: {what} (run again with --debug for the traceback)")
        return 1
    show = getattr(error, "show", None)
    if callable(show):  # usage errors know how to show themselves
        with suppress(OSError, ValueError):  # UnicodeEncodeError is a ValueError
            show()
        if override := _bare_override(arguments):
            _say(f"an override is written as --set {override}")
        return code
    prefix = "" if code == _STOPPED else "error: "
    for problem in getattr(error, "problems", None) or [_text(error)]:
        _say(f"{prefix}{problem}")
    return code


def _bare_override(arguments: Sequence[str]) -> str | None:
    """The first `section.key=value` without --set, as other programs take it."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before != "--set" and (found := re.fullmatch(r"(?:--)?([a-z_]+(?:\.[a-z_0-9]+)+=.*)", argument, re.DOTALL)):
            return found[1]
    return None


def _tell_launcher(error: Exception) -> None:
    """Leaves the message where torchrun and accelerate, which end with a report of their own, take it from."""
    from vamo_ft.commands.secrets import masked

    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        text = masked("\n".join(map(_one_line, getattr(error, "problems", None) or [_text(error)])))
        shown = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": shown}), encoding="utf-8")


def _text(error: Exception) -> str:
    try:
        return str(error).strip()
    except Exception as another:  # a library's message that cannot be put together
        return f"its message cannot be shown ({type(another).__name__})"


def _say(text: str, *, one_line: bool = True) -> None:
    """Prints to standard error without secrets; on one line, without what a terminal would obey."""
    from vamo_ft.commands.secrets import masked

    text = masked(text)
    if one_line:
        text = _one_line(text)
    try:
        print(text.rstrip("\n"), file=sys.stderr)
    except UnicodeEncodeError:
        print(text.encode("ascii", "backslashreplace").decode(), file=sys.stderr)
    except (OSError, ValueError):  # nobody listens any more
        return


def _one_line(text: str) -> str:
    text = " ".join(line.strip() for line in text.splitlines())
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
