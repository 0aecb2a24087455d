"""How to run each artifact: what the model card and the report give people to copy."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

_PROMPT = "The capital of France is"

_SCRIPT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({path}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({path})
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"""


@dataclass(frozen=True)
class Usage:
    """One way to run an artifact: ``text`` in ``language`` (python or bash), and what to know about it."""

    title: str
    language: str
    text: str
    note: str = ""


def usages(name: str, path: str) -> list[Usage]:
    """How to run an artifact.

    Args:
        name: of its format (:data:`axolotl_bitnet.formats.registry.FORMATS`).
        path: where it is, as it is to be written.

    Returns:
        The usual way first; nothing for an unknown format.
    """
    quoted, prompt = shlex.quote(path), f'"{_PROMPT}"'
    script = _SCRIPT.format(path=json.dumps(path, ensure_ascii=False), prompt=_PROMPT)
    if name == "packed":
        note = (
            "Transformers compiles its unpacking, which needs a C++ compiler; `TORCH_COMPILE_DISABLE=1` does "
            "without."
        )
        return [Usage("Packed, in transformers", "python", script, note)]
    if name.startswith("gguf-"):
        title = f"{Path(path).name}, in llama.cpp"
        return [Usage(title, "bash", f"llama-cli -m {quoted} -p {prompt} -n 64")]
    if name == "dense":
        note = (
            "The same weights, `codes / scale`; activations are not quantized, so answers are near the "
            "ternary model's, not equal."
        )
        serve = Usage(
            "Dense bfloat16, in vLLM and SGLang", "bash", f"vllm serve {quoted} --dtype bfloat16", note
        )
        return [serve, Usage("Dense bfloat16, in transformers", "python", script)]
    if name == "mlx":
        text = f"mlx_lm.generate --model {quoted} --prompt {prompt} --max-tokens 64"
        return [Usage("MLX, in mlx-lm", "bash", text)]
    return []
