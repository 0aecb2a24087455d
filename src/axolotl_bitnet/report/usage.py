"""How to run what a run made: commands to copy, for each artifact."""

from __future__ import annotations

import shlex
from typing import Any

from .sources import Run

_SCRIPT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({text}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({text})
messages = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))"""

_COMMANDS = {
    "packed": ("In Python, with plain transformers (2 bits a weight)", _SCRIPT),
    "gguf": ("With llama.cpp", 'llama-cli -m {path} -p "The capital of France is" -n 64'),
    "dense": (
        "Dense bfloat16, for vLLM and others (activations are not quantized: near the ternary model)",
        "vllm serve {path} --dtype bfloat16",
    ),
    "mlx": ("On a Mac, with MLX", 'mlx_lm.generate --model {path} --prompt "Hello"'),
}


def commands(run: Run) -> list[dict[str, str]]:
    """``title`` and ``text`` of what to type, for the artifacts there are, then for checking and going on."""
    found = []
    entries: Any = run.bitnet.get("artifacts")
    for name, entry in (entries if isinstance(entries, dict) else {}).items():
        path = entry.get("path") if isinstance(entry, dict) else None
        kind = next((kind for kind in _COMMANDS if str(name).startswith(kind)), None)
        if kind is None or not isinstance(path, str) or entry.get("verified") is False:
            continue
        title, template = _COMMANDS[kind]
        where = str(run.folder / path)
        found.append({"title": title, "text": template.format(path=shlex.quote(where), text=repr(where))})
        check = f"axolotl bitnet verify {shlex.quote(where)}"
        found.append({"title": f"Is {name} still the model that trained?", "text": check})
    if run.bitnet:
        text = f"base_model: {run.folder}\nplugins:\n  - axolotl_bitnet.BitNetPlugin\nuse_onebitllms: true"
        found.append({"title": "Train on from the latents: in the next config", "text": text})
    return found
