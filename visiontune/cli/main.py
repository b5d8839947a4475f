"""The ``visiontune`` command: parses the verb, runs it, and turns the user's errors into one line and status 2."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from visiontune import __version__, cli
from visiontune.errors import UserError
from visiontune.outside import shown
from visiontune.quiet import defer, hushed
from visiontune.signals import Terminated, terminable

_EXAMPLES = """examples:
  visiontune demo
  visiontune train personalise/oft data.root=my_photos train.steps=200
  visiontune sample adapter=runs/oft/adapter.safetensors prompts=prompts.txt
  visiontune show personalise/oft
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def verbs() -> dict[str, ModuleType]:
    """The verbs by name, in alphabetical order: the modules of this folder that have ``add_arguments`` and ``run``."""
    names = sorted(m.name for m in pkgutil.iter_modules(cli.__path__) if not m.name.startswith("_"))
    modules = {name: importlib.import_module(f"{cli.__name__}.{name}") for name in names}
    return {name: m for name, m in modules.items() if hasattr(m, "add_arguments") and hasattr(m, "run")}


def parser() -> Parser:
    """The whole command line; builds without importing anything heavy."""
    top = Parser(
        prog="visiontune",
        description="Fine-tune diffusion models: any adapter, with any objective, on any model family.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"visiontune {__version__}")
    parsers = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb, module in verbs().items():
        summary = (module.__doc__ or verb).partition("\n")[0]
        sub = parsers.add_parser(
            verb,
            help=summary[0].lower() + summary[1:].rstrip("."),
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run, parser=sub)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    It is 0, 1 after a bug, 2 after an error that the user can mend, 3 after an alarm, and 128 and the number of the
    signal where one ended it: 130 for Ctrl-C, 143 for SIGTERM.
    """
    args, rest = parser().parse_known_args(argv)
    if rest:
        # argparse gives up a `*` positional once an option has come between; overrides may stand anywhere.
        if not hasattr(args, "words") or any(word.startswith("-") for word in rest):
            args.parser.error(f"unknown argument: {' '.join(rest)}")
        args.words += rest
    try:
        with terminable(), hushed():
            defer()
            args.run(args)
        sys.stdout.flush()
    except UserError as error:
        return _complain(str(error), error.status)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except Terminated as stop:
        return _complain("terminated", stop.status)
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MemoryError:
        return _complain("this machine's memory does not suffice: take smaller batches or pictures, or fewer of them")
    except OSError as error:
        if error.errno is None:
            return _report(error)
        # Of a file that takes another's place, the other is what the user knows.
        name = error.filename2 or error.filename or "cannot read or write"
        return _complain(f"{shown(str(name))}: {error.strerror}")
    except (Exception, SystemExit, GeneratorExit) as error:
        # Code of a user may call exit(), which must not look like success.
        return _report(error)
    return 0


def _report(error: BaseException) -> int:
    """Say in one line that ``error`` is no mistake of the user's, and where its traceback is."""
    what = shown(" ".join(f"{type(error).__name__}: {error}".split()))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="visiontune-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.writelines(traceback.format_exception(error))
    except OSError:
        traceback.print_exception(error)
        return _complain(
            f"this is a bug of visiontune or of code that it ran ({what}): please report the lines above", 1
        )
    return _complain(
        f"this is a bug of visiontune or of code that it ran ({what}): please report it with {file.name}", 1
    )


def _complain(message: str, status: int = 2) -> int:
    print(f"visiontune: {' '.join(message.splitlines())}", file=sys.stderr)
    return status
