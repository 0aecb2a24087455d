"""Time, memory and bytes of every format's writer, and of onebitllms.

    python benchmarks/packing.py [--layers 32] [--dtype bfloat16] [--shards 1 10] [--formats packed dense]
                                 [--repeats 3] [--onebitllms FOLDER] [--csv FILE] [--dir /tmp]

A latent checkpoint with Falcon-E-3B's shapes (hidden 2048, intermediate 13312, 32 layers, 16 heads, 2 KV
heads of 128, vocabulary 32768, untied) is made of random numbers in a temporary folder. Each measurement is a
process of its own; the checkpoint is in the page cache if there is memory for it. Of each are given the
seconds, those of the processors, the peak resident memory, how far that is above what it was after the
imports (torch, transformers' Llama, the writer), the bytes written and the machine's load. Beside them: how
fast the same disk takes as many bytes, from one sequential write and fsync.

``--onebitllms`` is a folder with onebitllms 0.0.4 in it (pip install --target, or its wheel unzipped): its
``quantize_to_1bit`` runs on a CPU. Linux only: the peak is VmHWM of /proc/self/status, because getrusage's
would start at the parent's.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from axolotl_bitnet.formats.export import export
from axolotl_bitnet.formats.registry import FORMATS
from axolotl_bitnet.model.entry import CONFIG_KEY
from axolotl_bitnet.storage.atomic import write_json
from axolotl_bitnet.storage.safetensors_stream import INDEX, SINGLE, Entry, SafetensorsWriter

TOKENIZER = Path(__file__).parents[1] / "examples" / "falcon-e" / "tiny" / "model"
FIELDS = [
    *("writer", "dtype", "shards", "layers", "latents_MiB", "largest_MiB", "written_MiB", "seconds"),
    *("cpu_seconds", "peak_MiB", "above_imports_MiB", "load", "disk_MiB_s"),
]


def mib(count: float) -> int:
    return round(count / 2**20)


def make_latents(folder: Path, layers: int, dtype: torch.dtype, shards: int) -> list[Entry]:
    """A random latent checkpoint; returns its tensors' entries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=13312,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=32768,
        tie_word_embeddings=False,
        dtype=str(dtype).removeprefix("torch."),
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    converted = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    converted.remove("lm_head")
    entries = [Entry(name, dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    random: dict[tuple[int, ...], torch.Tensor] = {}
    places: dict[str, str] = {}
    step = -(-len(entries) // shards)
    for number in range(shards):
        name = SINGLE if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        inside = entries[number * step : (number + 1) * step]
        with SafetensorsWriter(folder / name, inside) as writer:
            for entry in inside:
                if entry.shape not in random:
                    random[entry.shape] = (torch.randn(entry.shape) * 0.02).to(dtype)
                writer.write(entry.name, random[entry.shape])
        places |= dict.fromkeys((entry.name for entry in inside), name)
    if shards > 1:
        write_json(folder / INDEX, {"metadata": {}, "weight_map": places})
    write_json(
        folder / "config.json",
        config.to_dict() | {CONFIG_KEY: {"definition": 1, "converted": converted, "dense": ["lm_head"]}},
    )
    for path in TOKENIZER.glob("token*"):
        shutil.copy(path, folder)
    return entries


def memory(key: str) -> int:
    """A figure of this process in bytes: ``VmRSS`` (resident now) or ``VmHWM`` (its peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def write_and_report(name: str, source: str, target: str, onebitllms: str | None) -> None:
    """In a child: write once; a line of JSON."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    write: Any
    if name == "onebitllms":
        sys.path.insert(0, str(onebitllms))
        from onebitllms import quantize_to_1bit as write
    else:
        FORMATS[name].format  # noqa: B018 (imports it)
        write = partial(export, name)
        if name.startswith("gguf"):
            __import__("gguf")
    before, start, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    write(source, target)
    took = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    print(json.dumps({"before": before, "peak": memory("VmHWM"), **took}))


def disk_rate(folder: Path, nbytes: int) -> float:
    """MiB a second of one sequential write of as many bytes, brought to the disk."""
    piece, path = os.urandom(8 << 20), folder / "rate"
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(max(1, nbytes // len(piece))):
            file.write(piece)
        os.fsync(file.fileno())
    rate = path.stat().st_size / 2**20 / (time.perf_counter() - start)
    path.unlink()
    return rate


def measure(folder: Path, name: str, onebitllms: str | None) -> dict[str, Any]:
    target = folder / "out" / ("model.gguf" if name.startswith("gguf") else name)
    target.parent.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--one", name, str(folder / "latents"), str(target)]
    command += ["--onebitllms", onebitllms] if onebitllms else []
    load = os.getloadavg()[0]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    files = [target] if target.is_file() else list(target.iterdir())
    written = sum(path.stat().st_size for path in files)
    shutil.rmtree(folder / "out")
    return {
        "written_MiB": mib(written),
        "seconds": round(result["seconds"], 1),
        "cpu_seconds": round(result["cpu"], 1),
        "peak_MiB": mib(result["peak"]),
        "above_imports_MiB": mib(result["peak"] - result["before"]),
        "load": round(load, 1),
        "disk_MiB_s": round(disk_rate(folder, written)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"])
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--formats", nargs="+", default=[*FORMATS])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--onebitllms", help="folder that holds the package")
    parser.add_argument("--csv", type=Path, help="file to append every measurement to")
    parser.add_argument("--dir", type=Path, help="where the temporary folder is made")
    parser.add_argument("--one", nargs=3, metavar=("FORMAT", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.one:
        write_and_report(*args.one, args.onebitllms)
        return
    for dtype in args.dtype:
        for shards in args.shards:
            with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
                folder = Path(temporary)
                (folder / "latents").mkdir()
                entries = make_latents(folder / "latents", args.layers, getattr(torch, dtype), shards)
                about = {
                    "dtype": dtype,
                    "shards": shards,
                    "layers": args.layers,
                    "latents_MiB": mib(sum(entry.nbytes for entry in entries)),
                    "largest_MiB": mib(max(entry.nbytes for entry in entries)),
                }
                for name in [*args.formats, *(["onebitllms"] if args.onebitllms else [])]:
                    rows = [
                        {"writer": name, **about, **measure(folder, name, args.onebitllms)}
                        for _ in range(args.repeats)
                    ]
                    median = statistics.median(row["seconds"] for row in rows)
                    print(f"{median:6.1f} s (median)  {rows[-1]}", flush=True)
                    if args.csv:
                        new = not args.csv.exists()
                        with args.csv.open("a", newline="") as file:
                            writer = csv.DictWriter(file, FIELDS)
                            if new:
                                writer.writeheader()
                            writer.writerows(rows)


if __name__ == "__main__":
    main()
