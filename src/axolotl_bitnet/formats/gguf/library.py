"""The gguf package, which is optional."""

from __future__ import annotations

from typing import Any


def library() -> Any:
    """The gguf package.

    Raises:
        ImportError: it is not installed; the message has the command that installs it.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError('GGUF needs the gguf package: pip install "axolotl-bitnet[gguf]"') from error
    return gguf
