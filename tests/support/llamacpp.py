"""llama.cpp, as the wheel of xllamacpp carries it: its server on a local port, asked over HTTP."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HARMLESS = 18  # a token that is a whole character, in all tokenizers of the tests


class LlamaCpp:
    """A GGUF file, loaded."""

    def __init__(self, file: Path, context: int = 512, threads: int = 1):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_gpu_layers, params.n_parallel = context, 0, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup = params.fit_params = False
        params.verbosity = 0
        self._server = xllamacpp.Server(params)

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self._server.listening_address + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def tokenize(self, text: str) -> list[int]:
        return list(self.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"])

    def greedy(self, ids: list[int], count: int) -> list[int]:
        answer = self.post("/completion", prompt=ids, n_predict=count, temperature=0, return_tokens=True)
        return list(answer["tokens"])

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
