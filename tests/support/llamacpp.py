"""llama.cpp, as verify runs it, asked for more."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from axolotl_bitnet.verify import engines

_HARMLESS = 18  # a token that is a whole character, in all tokenizers of the tests


class LlamaCpp(engines.LlamaCpp):
    """A GGUF file, loaded; computed in one thread, for the tests' models are tiny."""

    def __init__(self, file: Path, context: int = 512) -> None:
        super().__init__(file, context, threads=1)

    def tokenize(self, text: str) -> list[int]:
        return list(self.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"])

    def logprobs(self, ids: list[int], vocabulary: int) -> Tensor:
        """Of the token after ``ids``, float32 (vocabulary,). The server tells them of a token it has printed,
        so it is made to print one that it can; they are those of before."""
        answer = self.post(
            "/completion",
            prompt=ids,
            n_predict=1,
            temperature=0,
            n_probs=vocabulary,
            logit_bias=[[_HARMLESS, 1e4]],
        )
        result = torch.full((vocabulary,), float("nan"))
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            result[entry["id"]] = entry["logprob"]
        return result
