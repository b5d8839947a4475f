"""Methods are files: the file name is the key, and nothing has to be registered.

A plug-in of a kind (``adapters``, ``objectives``, ``rewards``) is a module ``visiontune/<kind>/<name>.py`` that defines
``Config`` (see :mod:`visiontune.schema`) and ``build(config, ...)``. A dotted path or a ``.py`` file admits one from
outside the package, which runs its code: such a name comes from the person who runs visiontune, never from a file that
was read (:func:`permitted`).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from visiontune import schema
from visiontune.errors import UserError

_PACKAGE = Path(__file__).parent
_NOT_METHODS = ("base", "stack")
_DEFINES_CONFIG = re.compile(r"^(class Config\b|Config\b.*=)", re.MULTILINE)


def names(kind: str) -> list[str]:
    """The methods of a kind, sorted: the files that define a ``Config``. Nothing is imported."""
    return sorted(
        file.stem
        for file in (_PACKAGE / kind).glob("*.py")
        if not file.stem.startswith("_")
        and file.stem not in _NOT_METHODS
        and _DEFINES_CONFIG.search(file.read_text(encoding="utf-8"))
    )


def load(kind: str, name: str) -> ModuleType:
    """Import a method by file name, by dotted path (``mypackage.mymethod``) or by path of a ``.py`` file.

    Raises:
        UserError: there is no such method, or a package that it needs is not installed.
    """
    if name.endswith(".py"):
        return _load_file(name)
    if "." not in name:
        if name not in names(kind):
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
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        if error.name and f"{dotted}.".startswith(f"{error.name}."):
            raise UserError(f"there is no module '{error.name}': install it or correct '{dotted}'") from error
        raise _needs(dotted, error) from error


def _needs(method: str, error: ModuleNotFoundError) -> UserError:
    return UserError(f"'{method}' needs the package '{error.name}': install it with pip")


def _load_file(name: str) -> ModuleType:
    file = Path(name).expanduser()
    if not file.is_file():
        raise UserError(f"there is no file '{name}'")
    module_name = f"visiontune_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"'{name}' cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name while they are being defined.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise _needs(name, error) from error
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
    if not dataclasses.is_dataclass(getattr(module, "Config", None)) or not callable(getattr(module, "build", None)):
        raise UserError(
            f"{path}.name: '{name}' defines no Config (a dataclass) with a build, so it is not one of the {kind}"
        )
    return module, schema.from_mapping(module.Config, {k: v for k, v in options.items() if k != "name"}, path)
