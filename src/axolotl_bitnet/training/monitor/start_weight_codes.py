"""The codes and scales of a run's start, beside its checkpoints: a resumed run counts from there.

A file per rank where weights are sharded, else one: the codes that :func:`observe` measures, 2 bits each, at
most 2 MiB in all.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...ops import pack_codes, unpack_codes
from ..log import is_main_process, rank
from .figures import Observation

_FILE = "bitnet_monitor_{rank}.safetensors"


def save_start(folder: Path, seen: Observation) -> None:
    """Write this rank's part into a checkpoint."""
    if not is_main_process() and not seen.sharded:
        return
    tensors = {f"codes.{index}": _packed(codes) for index, codes in enumerate(seen.start)}
    tensors["scales"] = torch.tensor([v.scale_start for v in seen.layers.values()], dtype=torch.float64)
    save_file(tensors, folder / _FILE.format(rank=rank()), metadata={"layers": json.dumps(list(seen.layers))})


def load_start(folder: Path, seen: Observation) -> tuple[list[Tensor], dict[str, float]] | None:
    """Codes in the shapes of ``seen.start`` and absmeans by layer; None if they are not there, or of other
    layers or shards."""
    path = folder / _FILE.format(rank=rank() if seen.sharded else 0)
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            if json.loads((file.metadata() or {}).get("layers", "[]")) != list(seen.layers):
                return None
            packed = [file.get_tensor(f"codes.{index}") for index in range(len(seen.start))]
            scales = file.get_tensor("scales").tolist()
    except (SafetensorError, ValueError):
        return None
    if [tensor.numel() for tensor in packed] != [_bytes(codes) for codes in seen.start]:
        return None
    codes = [_unpacked(one, like) for one, like in zip(packed, seen.start, strict=True)]
    return codes, dict(zip(seen.layers, scales, strict=True))


def _bytes(codes: Tensor) -> int:
    return -(-codes.numel() // 4)


def _packed(codes: Tensor) -> Tensor:
    flat = torch.nn.functional.pad(codes.cpu().flatten(), (0, 4 * _bytes(codes) - codes.numel()))
    return pack_codes(flat.view(4, -1)).flatten()


def _unpacked(packed: Tensor, like: Tensor) -> Tensor:
    flat = unpack_codes(packed.view(1, -1)).flatten()[: like.numel()]
    return flat.view(like.shape).to(like.device)
