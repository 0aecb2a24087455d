"""How large a model's artifacts will be, from its outline: the bytes of their tensors, by arithmetic alone.

Tokenizers, configs and the files' own headers are not counted (some MB). Each line is how its format stores a
ternary weight; the tests compare them with files that the formats wrote.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..model.outline import Outline

LATENTS = "latents"
_GGUF_BITS = {"gguf-tq1_0": 54 * 8 / 256, "gguf-tq2_0": 66 * 8 / 256, "gguf-q2_0": 18 * 8 / 64}
_MLX_GROUPS = (128, 64, 32)


def artifact_bytes(outline: Outline, export: Sequence[str], latent_bytes: int) -> dict[str, int]:
    """Bytes of the saved latents and of each export, by name; a format that is not known is left out."""
    ternary, others = outline.ternary_weights, outline.others
    vectors = others - outline.embedding
    sizes = {LATENTS: latent_bytes * outline.parameters}
    for name in export:
        if name == "packed":
            sizes[name] = ternary // 4 + 2 * len(outline.ternary) + 2 * others
        elif name == "dense":
            sizes[name] = 2 * outline.parameters
        elif name == "mlx":
            groups = sum(m.weights // _mlx_group(m.columns) for m in outline.ternary)
            sizes[name] = ternary // 4 + 4 * groups + 2 * others
        elif name in _GGUF_BITS:
            sizes[name] = int(ternary * _GGUF_BITS[name] / 8) + 2 * outline.embedding + 4 * vectors
    return sizes


def _mlx_group(columns: int) -> int:
    return next((size for size in _MLX_GROUPS if columns % size == 0), columns)
