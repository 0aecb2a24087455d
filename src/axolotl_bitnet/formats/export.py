"""The public functions that write a stored ternary model in another format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..model.layer_plan import CONFIG_KEY
from .config_json import DENSE, FORMAT, in_bfloat16, with_rope_theta
from .dense import DenseLayout
from .folder_writer import rewrite
from .gguf.writer import write_gguf
from .mlx import MLXLayout, mlx_config, refuse_architecture
from .packed import PackedLayout, packed_config
from .registry import open_checkpoint


def pack_checkpoint(
    src: str | Path,
    dst: str | Path,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Pack a ternary model to 2 bits a weight.

    Works tensor by tensor: memory stays below twice the largest tensor plus 300 MiB. The folder appears when
    it is complete, or not at all.

    Args:
        src: folder of latents, as training saves it: config.json, safetensors (single or sharded), tokenizer;
            or a ternary model in any other format that this package reads.
        dst: folder to make.
        overwrite: replace ``dst`` if it exists.
        check: called with the finished folder before it gets its name; if it raises, nothing is left behind.

    Returns:
        ``dst``.

    Raises:
        CheckpointError: the source cannot be read or packed, or the target exists.
    """
    source = open_checkpoint(src)
    return rewrite(source, dst, PackedLayout(), packed_config(source.config, source.names), overwrite, check)


def revert_checkpoint(
    src: str | Path,
    dst: str | Path,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a ternary model as a dense bfloat16 one: ``codes / s``, within 0.4 % a weight.

    It computes without the quantization of activations that trained, so its logits are near those of the
    ternary model, not equal.

    Args:
        src: a ternary model in any format, a folder or a GGUF file.
        dst: folder to make.
        overwrite: replace ``dst`` if it exists.
        check: called with the finished folder before it gets its name; if it raises, nothing is left behind.

    Returns:
        ``dst``.

    Raises:
        CheckpointError: the source cannot be read, a scale would not be recoverable, or the target exists.
    """
    source = open_checkpoint(src)
    config = with_rope_theta(in_bfloat16(source.config))
    config[CONFIG_KEY] = {**config[CONFIG_KEY], FORMAT: DENSE}
    return rewrite(source, dst, DenseLayout(), config, overwrite, check)


def export_mlx(
    src: str | Path,
    dst: str | Path,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a ternary model for mlx-lm, at 2.25 bits a weight. Needs no MLX.

    Args:
        src: a ternary model in any format, a folder or a GGUF file.
        dst: folder to make.
        overwrite: replace ``dst`` if it exists.
        check: called with the finished folder before it gets its name; if it raises, nothing is left behind.

    Returns:
        ``dst``.

    Raises:
        CheckpointError: the source cannot be read, MLX has no such layers in this architecture, a scale would
            not be recoverable, or the target exists.
    """
    source = open_checkpoint(src)
    refuse_architecture(source.config, src)
    return rewrite(source, dst, MLXLayout(), mlx_config(source), overwrite, check)


def export_gguf(
    src: str | Path,
    file: str | Path,
    type: str = "tq2_0",
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
    embeddings: str = "bf16",
) -> Path:
    """Write a ternary model as one GGUF file.

    Works tensor by tensor: memory stays below twice the largest tensor plus 300 MiB. The file appears when it
    is complete, or not at all. A ternary layer whose rows are no multiple of 256 is written as F16, with the
    same values; a warning names it.

    Args:
        src: a ternary model of any format, with its tokenizer.
        file: file to make.
        type: of the ternary layers, tq2_0 or tq1_0 (smaller, slower).
        overwrite: replace ``file`` if it exists.
        check: called with the finished file before it gets its name; if it raises, nothing is left behind.
        embeddings: type of embedding and head: bf16 (as packed), f16 or q8_0 (smaller, not exact).

    Returns:
        ``file``.

    Raises:
        CheckpointError: the source cannot be read, llama.cpp cannot run it as it was trained (architecture,
            RoPE scaling, tokenizer), or the target exists.
        ImportError: the gguf package is missing.
    """
    target = Path(file)
    write_gguf(open_checkpoint(src), target, type, overwrite, check, embeddings)
    return target
