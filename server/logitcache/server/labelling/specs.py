"""A SPEC, ``module:callable``: how a command line names a teacher or a dataset.

The working folder is importable. Code is imported for whoever runs the command, never for a request.
"""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from logitcache.labels.errors import LogitcacheError, SpecNotFound


def load(spec: str, role: str, fault: type[LogitcacheError]) -> Any:
    """Import the module of a SPEC and call its callable without arguments; gives what it returns.

    ``role`` is what messages call it (``"teacher"``), ``fault`` the error for when the callable itself raises.

    Raises:
        SpecNotFound: not of the form ``module:callable``, no such module, or nothing callable of that name in it.
    """
    make = _resolve(spec, role)
    try:
        return make()
    except LogitcacheError:
        raise
    except Exception as error:
        raise fault(f"the {role} {spec!r} could not be made: it raised {type(error).__name__}: {error}") from error


def _resolve(spec: str, role: str) -> Callable[[], Any]:
    module_name, colon, path = spec.partition(":")
    if not (module_name and colon and path):
        raise SpecNotFound(f"--{role} {spec!r} is not of the form module:callable, as in my_project.models:{role}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    found = _import(module_name, spec, role)
    for part in path.split("."):
        if not hasattr(found, part):
            names = [name for name in dir(found) if not name.startswith("_")]
            close = difflib.get_close_matches(part, names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(names[:8]) or 'no public names'}"
            raise SpecNotFound(f"--{role} {spec!r}: {module_name} has no {part!r}; {hint}")
        found = getattr(found, part)
    if hasattr(found, "state_dict") and not isinstance(found, type):
        raise SpecNotFound(f"--{role} {spec!r} is the {role} itself: name a function without arguments that returns it")
    if not callable(found):
        raise SpecNotFound(f"--{role} {spec!r} is a {type(found).__name__}, not a callable that returns the {role}")
    return found  # type: ignore[no-any-return]


def _import(module_name: str, spec: str, role: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise SpecNotFound(
                f"--{role} {spec!r}: there is no module {error.name!r}; looked in {Path.cwd()} and the environment"
            ) from None
        raise SpecNotFound(f"--{role} {spec!r}: {module_name} needs {error.name!r}, which is not installed") from error
    except Exception as error:
        raise SpecNotFound(
            f"--{role} {spec!r}: importing {module_name} raised {type(error).__name__}: {error}"
        ) from error
