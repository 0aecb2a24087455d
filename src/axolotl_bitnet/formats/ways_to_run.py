"""How each format is run: what to type, and what came out when that was done.

The tables of README and docs/run-it.md, the model card and the report say this. It is not in the formats'
own files because those import torch, for which a report need not wait.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

PROMPT = "The capital of France is"

_SCRIPT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({path}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({path})
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"""


@dataclass(frozen=True)
class WayToRun:
    """One way to run an artifact.

    Attributes:
        engine: what runs it.
        device: what that is for.
        language: of ``text``: python or bash.
        text: what to type.
        ran: the versions, dtypes and devices that it was run with.
        result: what came out then.
        note: what else to know about it.
    """

    engine: str
    device: str
    language: str
    text: str
    ran: str
    result: str
    note: str = ""


def packed(path: str) -> list[WayToRun]:
    note = (
        "Transformers compiles its unpacking, which needs a C++ compiler; `TORCH_COMPILE_DISABLE=1` does "
        "without."
    )
    quoted, exact = shlex.quote(path), "the trained model's logits, bit for bit"
    ours = "With axolotl-bitnet installed there. On a GPU weights stay at 2 bits."
    return [
        _in_transformers(path, "5.16 and 5.20, float32, CPU", exact, note),
        WayToRun(
            "transformers with axolotl-bitnet",
            "CPU, GPU",
            "bash",
            f"axolotl-bitnet chat {quoted}",
            "float32 and bfloat16, CPU; H100",
            f"{exact}, in bfloat16 too",
            ours,
        ),
        WayToRun(
            "vLLM with axolotl-bitnet",
            "CPU, GPU",
            "bash",
            f"vllm serve {quoted}",
            "0.32, float32, CPU; on a GPU the layer alone",
            "greedy tokens equal but for near ties",
            f"{ours} One GPU per model.",
        ),
    ]


def gguf(path: str, device: str = "CPU") -> list[WayToRun]:
    """On the device that llama.cpp is quick on with the type."""
    text = f'llama-cli -m {shlex.quote(path)} -p "{PROMPT}" -n 64'
    result = "greedy tokens equal; perplexity within 1 %"
    ran = "xllamacpp 2026.10, CPU" + ("; speed by Vulkan, H200" if device == "GPU" else "")
    return [WayToRun("llama.cpp", device, "bash", text, ran, result)]


def dense(path: str) -> list[WayToRun]:
    note = (
        "The same weights, `codes / scale`; activations are not quantized, so answers are near the "
        "ternary model's, not equal."
    )
    text = f"vllm serve {shlex.quote(path)} --dtype bfloat16"
    near = "near the trained model: activations are not quantized"
    serve = WayToRun("vLLM and SGLang", "GPU, CPU", "bash", text, "vLLM 0.32, float32, CPU", near, note)
    return [serve, _in_transformers(path, "5.16, float32, CPU", "logits of codes / s, bit for bit")]


def mlx(path: str) -> list[WayToRun]:
    text = f'mlx_lm.generate --model {shlex.quote(path)} --prompt "{PROMPT}" --max-tokens 64'
    result = "logits of codes / s to 1e-6"
    return [WayToRun("mlx-lm", "Apple", "bash", text, "0.32, Linux CPU", result)]


def _in_transformers(path: str, ran: str, result: str, note: str = "") -> WayToRun:
    """A script that generates with transformers."""
    script = _SCRIPT.format(path=json.dumps(path, ensure_ascii=False), prompt=PROMPT)
    return WayToRun("transformers", "CPU, GPU", "python", script, ran, result, note)
