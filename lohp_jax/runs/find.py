"""Finding a family or a method of the user's own: in a module, or in a file."""

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from lohp_jax.types import Method, TaskFamily


def find_family(where: str) -> TaskFamily:
    """Imports a `TaskFamily`; see `find`."""
    return find(where, TaskFamily)


def find_method(where: str) -> Method:
    """Imports a `Method`; see `find`."""
    return find(where, Method)


def find(where: str, kind: type) -> Any:
    """Imports a value of the user's own.

    Args:
      where: "package.module:attribute" or "path/to/file.py:attribute", relative to the working
        directory. The attribute, which may be dotted, is a `kind` or a function without arguments that
        returns one. While a module is imported, its folder, or for a module's name the working
        directory, is on the path of imports.
      kind: of the value.

    Raises: ValueError that says which part of `where` is wrong, and how; an error of the imported
      code is named with its line, and is the cause.
    """
    source, colon, attribute = where.rpartition(":")
    if not (source and colon and attribute):
        raise ValueError(
            f"find: expected 'package.module:attribute' or 'path/to/file.py:attribute', got "
            f"{where!r}."
        )
    is_file = source.endswith(".py") or os.sep in source
    module = _import_file(pathlib.Path(source)) if is_file else _import_module(source)
    return _read(where, _attribute(where, module, attribute), kind)


def _import_file(path: pathlib.Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(
            f"find: there is no file {str(path)!r} in {pathlib.Path.cwd()}{_nearest_file(path)}."
        )
    path = path.resolve()
    spec = importlib.util.spec_from_file_location(f"_found_in_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"find: expected a Python file that ends in .py, got {str(path)!r}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by its name
    try:
        with _on_path(path.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise _failed(f"importing {str(path)!r}", error) from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        with _on_path(pathlib.Path.cwd()):
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name
        if missing and (name == missing or name.startswith(f"{missing}.")):
            raise ValueError(
                f"find: there is no module {missing!r}, neither installed nor in "
                f"{pathlib.Path.cwd()}; a file is named with its ending, 'path/to/file.py:attribute'."
            ) from error
        raise _failed(f"importing {name!r}", error) from error


def _attribute(where: str, module: ModuleType, attribute: str) -> Any:
    value, seen = module, where.rpartition(":")[0]
    for name in attribute.split("."):
        if not hasattr(value, name):
            names = [n for n in dir(value) if not n.startswith("__")]
            nearest = difflib.get_close_matches(name, names, 1, 0)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"find: {seen!r} has no attribute {name!r}{hint}")
        value, seen = getattr(value, name), f"{seen}:{name}"
    return value


def _read(where: str, value: Any, kind: type) -> Any:
    """The value itself, or what a function without arguments returns."""
    if isinstance(value, kind):
        return value
    expected = f"a {kind.__name__}, or a function without arguments that returns one"
    if not callable(value):
        raise ValueError(f"find: expected {where!r} to be {expected}, got {_describe(value)}.")
    try:
        inspect.signature(value).bind()
    except TypeError as error:
        raise ValueError(
            f"find: expected {where!r} to be {expected}, got a function that needs arguments "
            f"({error}); give them defaults, or write a function without."
        ) from error
    except ValueError:  # written in C, without a signature
        pass
    try:
        with _on_path(pathlib.Path.cwd()):
            made = value()
    except (Exception, SystemExit) as error:
        raise _failed(f"calling {where!r}", error) from error
    if not isinstance(made, kind):
        raise ValueError(
            f"find: expected {where!r} to be {expected}, got a function that returns "
            f"{_describe(made)}."
        )
    return made


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 60 else text[:57] + '...'}"


def _failed(doing: str, error: BaseException) -> ValueError:
    """What went wrong in the user's code, and in which line of it."""
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}, line {error.lineno}"
    else:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_users(f.filename)]
        place = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else "unknown place"
    reason = error.msg if isinstance(error, SyntaxError) else str(error)
    return ValueError(f"find: {doing} failed, {type(error).__name__}: {reason} ({place})")


def _is_users(filename: str) -> bool:
    """Whether code is neither this module nor of the machinery of imports or installed packages."""
    parts = pathlib.Path(filename).parts
    installed = {"site-packages", "dist-packages"}.intersection(parts)
    own = pathlib.Path(__file__).parents[1]
    standard = os.path.dirname(os.__file__)
    machinery = filename.startswith("<") or filename.startswith(standard) or installed
    return not machinery and own not in pathlib.Path(filename).parents


def _nearest_file(path: pathlib.Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {str(path.parent)!r} either"
    names = [found.name for found in path.parent.glob("*.py")]
    nearest = difflib.get_close_matches(path.name, names, 1)
    return f"; did you mean {str(path.with_name(nearest[0]))!r}?" if nearest else ""


@contextlib.contextmanager
def _on_path(folder: pathlib.Path) -> Iterator[None]:
    """Imports find modules of `folder` first, for as long as the context lasts."""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before
