"""Programs other than transformers in which artifacts are run for comparison: llama.cpp and mlx-lm.

Each generates greedily from token ids. A program that is not installed raises ImportError with the command
that installs it; a program's own errors are raised as they are.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TOKENS = 8
"""Greedy tokens after each prompt."""


@dataclass
class Outputs:
    """Token ids (1, length) of a prompt and its greedy continuation, and the logits (length, vocabulary), if
    the program gives them."""

    ids: Tensor
    logits: Tensor | None
    prompt: int


def run_llama_cpp(file: Path, batches: list[Tensor]) -> list[Outputs]:
    """Greedy tokens of a GGUF file, on the CPU; llama.cpp's server returns no logits.

    Raises:
        ImportError: xllamacpp is not installed.
    """
    try:
        import xllamacpp
    except ImportError:
        raise ImportError("needs llama.cpp: pip install xllamacpp") from None

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx = max(batch.shape[1] for batch in batches) + TOKENS + 8
    settings.n_parallel, settings.n_gpu_layers, settings.verbosity = 1, 0, 0
    settings.warmup = settings.fit_params = False
    server = xllamacpp.Server(settings)  # on a port of this machine's own; token ids come by HTTP only
    local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    results = []
    for batch in batches:
        wish = {"prompt": batch[0].tolist(), "n_predict": TOKENS, "temperature": 0, "return_tokens": True}
        request = urllib.request.Request(
            f"{server.listening_address}/completion",
            data=json.dumps(wish).encode(),
            headers={"Content-Type": "application/json"},
        )
        with local.open(request) as answer:
            tokens = torch.tensor([json.load(answer)["tokens"]], dtype=batch.dtype)
        results.append(Outputs(torch.cat([batch, tokens], dim=1), None, batch.shape[1]))
    return results


def run_mlx(folder: Path, batches: list[Tensor]) -> list[Outputs]:
    """Greedy tokens and logits of an MLX folder in mlx-lm, in float32 on the CPU, without the rounding of a
    GPU's matrix products.

    Raises:
        ImportError: mlx-lm is not installed.
    """
    try:
        import mlx.core as mx
        import numpy as np
        from mlx_lm.utils import load_model
    except ImportError:
        raise ImportError("needs mlx-lm: pip install mlx-lm, or 'mlx[cpu]' mlx-lm without a Mac") from None

    with mx.stream(mx.cpu):
        model, _ = load_model(folder)
        model.set_dtype(mx.float32)
        results = []
        for batch in batches:
            ids = batch
            for _ in range(TOKENS + 1):  # once more than tokens: the logits of all of them
                logits = torch.from_numpy(np.array(model(mx.array(ids.numpy())))[0])
                ids = torch.cat([ids, logits[-1:].argmax(-1)[None]], dim=1)
            results.append(Outputs(ids[:, :-1], logits, batch.shape[1]))
    return results


ENGINES: dict[str, tuple[str, Callable[[Path, list[Tensor]], list[Outputs]]]] = {
    "gguf": ("llama.cpp", run_llama_cpp),
    "mlx": ("mlx-lm", run_mlx),
}
"""By the beginning of a format's name; all other formats run in transformers."""


def consumer_of(name: str) -> str:
    """The program that a format is run in for comparison."""
    return ENGINES[name.split("-")[0]][0] if name.split("-")[0] in ENGINES else "transformers"
