"""The ``visiontune`` command: parses the verb, runs it, and turns the user's errors into one line and status 2."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from visiontune import __version__, cli
from visiontune.errors import UserError
from visiontune.signals import Terminated, terminable

_EXAMPLES = """examples:
  visiontune demo
  visiontune train personalise/oft data.root=my_photos train.steps=200
  visiontune sample adapter=runs/oft/adapter.safetensors prompts=prompts.txt
  visiontune show personalise/oft
"""
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def verbs() -> dict[str, ModuleType]:
    """The verbs by name, in alphabetical order: the modules of this folder that have ``add_arguments`` and ``run``."""
    names = sorted(module.name for module in pkgutil.iter_modules(cli.__path__))
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
    """Run the command line and return its exit status: 0, 2 after an error that the user can mend, 3 after an alarm.

    128 and the number of the signal where one ended it: 130 for Ctrl-C, 143 for SIGTERM.
    """
    args, rest = parser().parse_known_args(argv)
    if rest:
        # argparse gives up a `*` positional once an option has come between; overrides may stand anywhere.
        if not hasattr(args, "words") or any(word.startswith("-") for word in rest):
            args.parser.error(f"unknown argument: {' '.join(rest)}")
        args.words += rest
    try:
        with terminable():
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
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        return _complain(f"{error.filename or 'cannot write'}: {error.strerror}")
    return 0


def _complain(message: str, status: int = 2) -> int:
    print(f"visiontune: {message}", file=sys.stderr)
    return status
