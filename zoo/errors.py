"""The exceptions a user meets: each is one clear message, never a traceback on the command line."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class ZooError(Exception):
    """A mistake the user can mend; the command line prints the message and exits with status 2."""


class ConfigError(ZooError):
    """A wrong config group, key or value."""


class DataError(ZooError):
    """A data file that cannot be used as it is."""


class CheckpointError(ZooError):
    """A weight file that cannot be read, or does not belong to the model."""


class UnknownName(ZooError):
    """A model, domain or card that does not exist."""


class MissingExtra(ZooError):
    """An optional dependency that this use needs is not installed."""


def nearest(name: str, options: Iterable[str], n: int = 3) -> list[str]:
    """The at most `n` entries of `options` that look most like `name`, best first."""
    return difflib.get_close_matches(name, sorted(set(options)), n=n, cutoff=0.5)


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The sentence ` Did you mean 'a' or 'b'?`, or an empty string when nothing is near."""
    found = nearest(name, options)
    return f" Did you mean {' or '.join(repr(f) for f in found)}?" if found else ""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Raises:
        MissingExtra: `module` is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtra(f'This needs {module}: pip install "attention-zoo[{extra}]"') from None
