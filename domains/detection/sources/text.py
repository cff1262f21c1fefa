"""Text files as they are passed on: what is no text is named."""

from __future__ import annotations

from pathlib import Path

from zoo.errors import DataError


def read_text(path: Path) -> str:
    """The content of a UTF-8 file.

    Raises:
        DataError: the file is missing, or no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text file.") from None
