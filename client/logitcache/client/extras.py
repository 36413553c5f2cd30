"""The part of this client that needs more than the light installation, imported when it is first used."""

import importlib
from types import ModuleType

from logitcache.labels.errors import MissingExtra


def import_with_torch(module: str) -> ModuleType:
    """A module that imports torch.

    Raises:
        MissingExtra: torch is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtra("losses and tensors need torch: pip install 'logitcache[torch]'", extra="torch") from error
