"""Methods are files: the file name is the key, and nothing has to be registered.

A plug-in of a kind (``adapters``, ``objectives``, ``rewards``) is a module ``visiontune/<kind>/<name>.py`` that defines
``Config`` (see :mod:`visiontune.schema`) and ``build(config, ...)``. A dotted path or a ``.py`` file admits one from
outside the package, which runs its code: such a name comes from the person who runs visiontune, never from a file that
was read (:func:`permitted`). Whatever that code raises is said in one line (:func:`guarded`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from visiontune import outside, schema
from visiontune.errors import UserError
from visiontune.signals import Terminated

_PACKAGE = Path(__file__).parent
_NOT_METHODS = ("base", "stack")
# Modules of .py files are called this and the file's stem.
_FILES = "visiontune_plugin_"
_DEFINES_CONFIG = re.compile(r"^(class Config\b|Config\b.*=)", re.MULTILINE)


def names(kind: str) -> list[str]:
    """The methods of a kind, sorted: the files that define a ``Config``. Nothing is imported."""
    return sorted(file.stem for file in (_PACKAGE / kind).glob("*.py") if _is_method(file))


def _is_method(file: Path) -> bool:
    hidden = file.stem.startswith("_") or file.stem in _NOT_METHODS
    return not hidden and bool(_DEFINES_CONFIG.search(file.read_text(encoding="utf-8")))


def load(kind: str, name: str) -> ModuleType:
    """Import a method by file name, by dotted path (``mypackage.mymethod``) or by path of a ``.py`` file.

    Raises:
        UserError: there is no such method, or a package that it needs is not installed.
    """
    if name.endswith(".py"):
        return _load_file(name)
    if "." not in name:
        # Only the one file is read: whatever is made by name comes through here.
        folder, file = _PACKAGE / kind, f"{name}.py"
        if file not in os.listdir(folder) or not _is_method(folder / file):
            raise UserError(f"'{name}' is not one of the {kind}{schema.nearest(name, names(kind))}")
        return _import(f"visiontune.{kind}.{name}")
    # An installed command does not see the working folder as `python -m` does, and users' plug-ins live there.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return _import(name)


def permitted(kind: str, name: Any, trust: Sequence[str], where: str) -> str:
    """The method that a file names, as :func:`load` may import it.

    Args:
        kind: folder of the package.
        name: what the file says.
        trust: methods from outside the package that its reader allows; a ``.py`` file is known by its name wherever it
            lay, and the reader's is the one that is taken.
        where: the file, for messages.

    Raises:
        UserError: it names none of the package, and none of ``trust``.
    """
    if isinstance(name, str) and name in names(kind):
        return name
    for given in trust:
        if given == name or (given.endswith(".py") and Path(given).name == Path(str(name)).name):
            return given
    raise UserError(
        f"{where} names the method {name!r}, which is none of visiontune's own and would run code from outside: if you "
        "know that code, allow it by trust"
    )


def _import(dotted: str) -> ModuleType:
    if not all(part.isidentifier() for part in dotted.split(".")):
        raise UserError(f"'{outside.shown(dotted)}' is no name of a module: write mypackage.mymethod, or a .py file")
    try:
        with guarded(dotted, f"'{dotted}', when it is imported,"):
            return importlib.import_module(dotted)
    except UserError as error:
        lacking = error.__cause__
        if not isinstance(lacking, ModuleNotFoundError) or not lacking.name:
            raise
        if f"{dotted}.".startswith(f"{lacking.name}."):
            raise UserError(f"there is no module '{lacking.name}': install it or correct '{dotted}'") from lacking
        raise _needs(dotted, lacking) from lacking


def _needs(method: str, error: ModuleNotFoundError) -> UserError:
    return UserError(f"'{method}' needs the package '{error.name}': install it with pip")


def _load_file(name: str) -> ModuleType:
    file = outside.regular(name)
    module_name = f"{_FILES}{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"'{name}' cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name while they are being defined.
    sys.modules[module_name] = module
    try:
        with guarded(module, f"'{name}', when it is imported,"):
            spec.loader.exec_module(module)
    except UserError as error:
        if isinstance(error.__cause__, ModuleNotFoundError) and error.__cause__.name:
            raise _needs(name, error.__cause__) from error.__cause__
        raise
    return module


def configure(kind: str, spec: str | Mapping[str, Any], path: str) -> tuple[ModuleType, Any]:
    """Import the method that ``spec`` names and validate its options.

    Args:
        kind: folder of the package, ``adapters`` for instance.
        spec: a name, or a mapping ``{"name": ..., **options}``.
        path: where the spec stands in the recipe, for error messages.

    Returns:
        The module and an instance of its ``Config``.
    """
    options = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(options, Mapping):
        raise UserError(f"{path} must be a name or a mapping with a name, not {spec!r}")
    name = options.get("name")
    if not isinstance(name, str):
        raise UserError(f"{path}.name is missing: one of the {kind}{schema.nearest('', names(kind))}")
    try:
        module = load(kind, name)
    except UserError as error:
        raise UserError(f"{path}.name: {error}") from error
    method = getattr(module, "Config", None)
    # An instance of a dataclass passes for one, too.
    if not (isinstance(method, type) and dataclasses.is_dataclass(method) and callable(getattr(module, "build", None))):
        raise UserError(
            f"{path}.name: '{name}' defines no Config (a dataclass) with a build, so it is not one of the {kind}"
        )
    with guarded(module, f"{path}: Config of '{name}'"):
        return module, schema.from_mapping(method, {k: v for k, v in options.items() if k != "name"}, path)


def build(module: ModuleType, config: Any, path: str) -> Any:
    """What the ``build`` of a method makes of ``config``; both come from :func:`configure`, and so does ``path``.

    Raises:
        UserError: the method is from outside the package, and raised anything.
    """
    with guarded(module, f"{path}: build(config)"):
        return module.build(config)


# ------------------------------------------------------------------------------------------- code from outside


def is_own(code: Any) -> bool:
    """Whether a module (or its name), a class, a function or an object is visiontune's own."""
    name = (
        code if isinstance(code, str) else getattr(code, "__name__" if isinstance(code, ModuleType) else "__module__")
    )
    return str(name).partition(".")[0] == __name__.partition(".")[0]


@contextmanager
def guarded(code: Any, call: str) -> Iterator[None]:
    """Say in one line what code from outside raised in the block, be it ``exit()``; our own may raise what it likes.

    An interruption passes, and so does what already is a line for the user. ``os._exit`` ends the process unseen.

    Args:
        code: what is run there: a module or its name, a class, a function, an object.
        call: whose it is and which call of it, which begins the message.

    Raises:
        UserError: names the call, the error, and the line of the code's file that led to it.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, Terminated):
        raise
    except BaseException as error:
        if is_own(code):
            raise
        raise UserError(f"{call} {_complaint(error)}{_place(error, code)}") from error


def guard_methods(cls: type, names: Sequence[str], kind: str) -> None:
    """Have those of ``names`` that a class from outside defines, functions or properties, run :func:`guarded`."""
    for name in names if not is_own(cls) else ():
        found = vars(cls).get(name)
        call = f"{kind} '{cls.__module__.removeprefix(_FILES)}', {name},"
        if isinstance(found, property) and found.fget is not None:
            setattr(cls, name, property(_guarding(found.fget, call)))
        elif isinstance(found, FunctionType):
            setattr(cls, name, _guarding(found, call))


def _guarding(function: Callable[..., Any], call: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with guarded(function, call):
            return function(*args, **kwargs)

    return run


def _complaint(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"called exit({'' if error.code is None else outside.shown(str(error.code))})"
    try:
        words = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    except Exception:
        words = ""
    kind = type(error).__name__
    return f"raised {kind}: {outside.shown(words)}" if words else f"raised {kind}"


def _place(error: BaseException, code: Any) -> str:
    """The file and the line of ``code`` that an error came by; where it was defined, if it did not come to run."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((str(_PACKAGE), "<frozen"))
    ]
    file = _file(code) or next((frame.filename for frame in frames), "")
    line = next((frame.lineno for frame in reversed(frames) if frame.filename == file), None)
    if isinstance(error, SyntaxError) and error.filename:
        file, line = error.filename, error.lineno
    elif line is None and hasattr(code, "__code__"):
        line = code.__code__.co_firstlineno
    return (f" ({Path(file).name}, line {line})" if line else f" ({Path(file).name})") if file else ""


def _file(code: Any) -> str | None:
    for kind in (code, type(code)):
        try:
            return inspect.getfile(kind)
        except (TypeError, OSError):
            continue
    return None
