"""A conversation with a packed model: its chat template, greedy answers, written as they come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TextStreamer

from .load_packed import load_packed


class Chat:
    """A packed model and what was said so far.

    Without a chat template in the folder each prompt is continued as plain text, without what went before.

    Args:
        folder: of the packed model.
        device: where it runs; by default a GPU if there is one. A CPU computes in float32.
    """

    def __init__(self, folder: str | Path, device: str | None = None):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32 if device == "cpu" else "auto"
        self.model = load_packed(folder, dtype=dtype, device_map=device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.messages: list[dict[str, str]] = []

    def answer(self, prompt: str, limit: int, write: Callable[[str], None]) -> str:
        """The model's answer, which joins the conversation.

        Args:
            prompt: what the user says.
            limit: tokens of the answer, at most.
            write: called with each piece of the text as soon as it is there.
        """
        self.messages.append({"role": "user", "content": prompt})
        inputs = self._inputs(prompt).to(self.model.device)
        streamer = _Streamer(self.tokenizer, write)
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, max_new_tokens=limit, do_sample=False, streamer=streamer)
        text = self.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})
        return str(text)

    def _inputs(self, prompt: str) -> Any:
        if not self.tokenizer.chat_template:
            return self.tokenizer(prompt, return_tensors="pt")
        return self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)
