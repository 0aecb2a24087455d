"""Size of stored weights, without torch: a report and a command's last line print it."""

from __future__ import annotations

from pathlib import Path


def weight_bytes(path: str | Path) -> int:
    """Size in bytes of a folder's safetensors files, or of a file."""
    path = Path(path)
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))
