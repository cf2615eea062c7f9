"""Methods from a module or a file of one's own: what ``--plugin`` names is imported and registers them."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from vtc.errors import InputError, VTCError
from vtc.method.registry import METHODS


def load_plugin(name: str) -> list[str]:
    """Import `name`, a module or the path of a .py file, and return the names of the methods it registers.

    Loading it again returns the same names. Raises InputError where it cannot be imported or registers nothing.
    """
    known = set(METHODS.names())
    try:
        module = _from_file(Path(name)) if name.endswith(".py") else _import(name)
    except BaseException:
        for each in set(METHODS.names()) - known:  # half a plugin would stand in the way of the mended one
            METHODS.unregister(each)
        raise
    registered = [each for each in METHODS.names() if each not in known or _belongs(each, module)]
    if not registered:
        raise InputError(f"plugin {name!r} registers no method; put @vtc.register above each class")
    return registered


def _belongs(method: str, module: ModuleType) -> bool:
    home = METHODS.get(method).__module__
    return home == module.__name__ or home.startswith(f"{module.__name__}.")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except VTCError:
        raise
    except Exception as error:
        advice = "; a file of your own is named by its path, such as ./mine.py"
        raise InputError(f"plugin {name!r} cannot be imported: {_reason(error)}{advice}") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"plugin {str(path)!r} is no file; write the path of a .py file or the name of a module")
    place = path.resolve()
    name = f"vtc_plugin_{place.stem}_{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, VTCError) or not isinstance(error, Exception):
            raise
        raise InputError(f"plugin {str(path)!r} cannot be imported: {_reason(error)}") from error
    return module


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
