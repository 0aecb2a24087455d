"""What the speed benchmarks share: who is compared, how a median is taken, how a CSV is written."""

from __future__ import annotations

import csv
import gc
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

RESULTS = Path(__file__).parent / "results"
PEERS = ("nn.Linear", "axolotl-bitnet", "onebitllms", "AutoBitLinear", "torchao")
FLOAT8 = ("float8 tensorwise", "float8 rowwise")  # torchao's, dense; eager they are slow


def make_ternary(model: nn.Module, peer: str, **settings: Any) -> None:
    """Turn every nn.Linear of a model (which has no head) into the peer's layer, in place: ternary, or dense
    with float8 products."""
    if peer == "axolotl-bitnet":
        from axolotl_bitnet import convert_to_bitlinear

        convert_to_bitlinear(model, **settings)
    elif peer == "onebitllms":
        from onebitllms import replace_linear_with_bitnet_linear

        if not hasattr(model, "dtype"):  # it asks for what models of transformers have
            model.dtype = next(model.parameters()).dtype
        replace_linear_with_bitnet_linear(model)
        torch.set_default_dtype(torch.float32)  # it leaves the model's behind
    elif peer == "AutoBitLinear":
        from transformers.integrations.bitnet import AutoBitLinear

        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = AutoBitLinear
                module.online_quant, module.rms_norm = True, None
    elif peer == "torchao":
        from torchao.prototype.quantized_training import bitnet_training
        from torchao.quantization import quantize_

        quantize_(model, bitnet_training())
    elif peer in FLOAT8:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        recipe = peer.removeprefix("float8 ")
        convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(recipe))
    elif peer != "nn.Linear":
        raise ValueError(f"{peer} is none of {(*PEERS, *FLOAT8)}")


def median_ms(run: Callable[[], object], repeats: int, warmup: int = 2) -> float:
    """Median of the GPU's own clock over single runs."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def free() -> None:
    """Forget what the last measurement left."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows of one set of columns."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append_csv(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Rows to the end of the file; a new file begins with the columns."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """What :func:`write_csv` wrote."""
    with path.open() as file:
        return list(csv.DictReader(file))


def machine() -> str:
    """GPU and versions, for the record beside the figures."""
    import transformers
    import triton

    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"transformers {transformers.__version__}"
    )
