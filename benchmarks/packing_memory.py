"""How much memory and time packing takes.

    python benchmarks/packing_memory.py [--gib 1.5] [--dtype bfloat16 float32] [--dir /tmp]

A latent checkpoint with Falcon-E-3B's shapes (hidden 2048, intermediate 13312, vocabulary 32768) is made of
random numbers in a temporary folder, in one file, with as many layers as the size asks for. It is packed in
a process of its own. Printed are that process's peak resident memory, absolute and above what it was after
the imports, the seconds (the file is in the page cache), and the sizes. ``--gib`` is the size of the
checkpoint in bfloat16; the same model in float32 is twice as large.

Mapped pages of the checkpoint count as resident. Linux only: the peak is VmHWM of /proc/self/status, because
getrusage's would start at the parent's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from axolotl_bitnet.checkpoint.artifacts import weight_bytes
from axolotl_bitnet.checkpoint.packed import pack_checkpoint
from axolotl_bitnet.checkpoint.stream import SINGLE, Entry, SafetensorsWriter, write_json
from axolotl_bitnet.convert import CONFIG_KEY

HIDDEN, INTERMEDIATE, KEYS, VOCABULARY = 2048, 13312, 256, 32768
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def make_latents(folder: Path, gib: float, dtype: torch.dtype) -> list[Entry]:
    """A random latent checkpoint of about ``gib`` GiB in bfloat16; returns its tensors' entries."""
    rest = gib * 2**30 / 2 - 2 * VOCABULARY * HIDDEN
    layers = max(1, round(rest / sum(rows * columns for rows, columns in LINEAR.values())))
    converted = [f"model.layers.{index}.{name}" for index in range(layers) for name in LINEAR]
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    shapes |= {f"{name}.weight": LINEAR[name.split(".", 3)[3]] for name in converted}
    entries = [Entry(name, dtype, shape) for name, shape in shapes.items()]
    random: dict[tuple[int, ...], torch.Tensor] = {}
    with SafetensorsWriter(folder / SINGLE, entries) as writer:
        for name, shape in shapes.items():
            if shape not in random:
                random[shape] = (torch.randn(shape) * 0.02).to(dtype)
            writer.write(name, random[shape])
    write_json(folder / "config.json", {CONFIG_KEY: {"converted": converted, "dense": ["lm_head"]}})
    return entries


def memory(key: str) -> int:
    """A figure of this process in bytes: ``VmRSS`` (resident now) or ``VmHWM`` (its peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def pack_and_report(source: str, target: str) -> None:
    before, start = memory("VmRSS"), time.perf_counter()
    pack_checkpoint(source, target)
    seconds = time.perf_counter() - start
    print(json.dumps({"before": before, "peak": memory("VmHWM"), "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.5, help="size of the latents in bfloat16")
    parser.add_argument(
        "--dtype", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"]
    )
    parser.add_argument("--dir", type=Path, help="where the temporary folder is made")
    parser.add_argument("--pack-only", nargs=2, metavar=("SOURCE", "TARGET"), help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.pack_only:
        pack_and_report(*args.pack_only)
        return
    for dtype in args.dtype:
        with tempfile.TemporaryDirectory(dir=args.dir) as name:
            source, target = Path(name) / "latents", Path(name) / "packed"
            source.mkdir()
            entries = make_latents(source, args.gib, getattr(torch, dtype))
            command = [sys.executable, __file__, "--pack-only", str(source), str(target)]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            latents, packed = weight_bytes(source), weight_bytes(target)
        largest = max(entry.nbytes for entry in entries)
        above = result["peak"] - result["before"]
        speed = latents / result["seconds"]
        print(
            f"{dtype}: {mib(latents)} in {len(entries)} tensors, the largest {mib(largest)}, packed to "
            f"{mib(packed)} in {result['seconds']:.1f} s ({mib(speed)}/s)\n"
            f"  peak resident memory {mib(result['peak'])}, {mib(above)} above the imports "
            f"({above / latents:.0%} of the checkpoint)"
        )


if __name__ == "__main__":
    main()
