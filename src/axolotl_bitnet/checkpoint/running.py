"""Two stored models run on the same prompts, one after the other, so that only one is in memory.

The trained model is built from its latents with BitLinear layers, everything else rounded to bfloat16 and
computed in float32. A packed model computes the same numbers in plain transformers, to the bit. A dense one
multiplies the same weights with activations that are not quantized: it is held, to the bit, against the
trained codes and scales computed so; how far that is from the trained model's 8-bit activations is told, not
judged.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import convert_to_bitlinear
from ..ternary import dequantize
from .formats import format_of
from .source import TernaryCheckpoint
from .verdict import Check

PROMPTS = (
    "The capital of France is",
    "What is 17 + 25?",
    "Once upon a time, in a small village by the sea,",
)
TOKENS = 8
"""Greedy tokens after each prompt."""

_TIE = 1e-4
"""Share of the range of a position's logits within which two tokens are as good as each other: a model that
generates with its cache adds in another order than one that reads the whole text."""


@dataclass
class Outputs:
    """Token ids (1, length) of a prompt and its greedy continuation, and the logits (length, vocabulary)."""

    ids: Tensor
    logits: Tensor
    prompt: int


def compare_running(
    artifact: TernaryCheckpoint, reference: TernaryCheckpoint, prompts: Sequence[str]
) -> Iterator[Check]:
    """Logits and greedy tokens of an artifact against the trained model's."""
    kind, trained = format_of(artifact), format_of(reference)
    load = _LOADERS.get(kind)
    if load is None:
        yield Check("running", f"{kind} does not run in transformers here", done=False)
        return
    if trained not in ("latents", "packed"):
        yield Check("running", f"{reference.folder} is {trained}, not the trained model", done=False)
        return
    try:
        batches = _encode(artifact, prompts)
    except Exception as error:  # whatever a tokenizer of somebody's throws
        yield Check("running", f"no tokenizer to run with: {error}", done=False)
        return
    outputs = _generate(load(artifact), batches)
    if kind != "dense":
        yield from _against(outputs, _LOADERS[trained](reference), exact=True)
        return
    if trained == "latents":
        yield from _against(outputs, _dense_arithmetic(reference), exact=True)
    yield from _against(outputs, _LOADERS[trained](reference), exact=False)


def _encode(artifact: TernaryCheckpoint, prompts: Sequence[str]) -> list[Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(artifact.companions, local_files_only=True)
    encoded = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    return [ids for ids in encoded if ids.numel()]


@torch.no_grad()
def _generate(model: nn.Module, batches: list[Tensor]) -> list[Outputs]:
    results = []
    for batch in batches:
        ids, step, cache = batch, batch, None
        for _ in range(TOKENS):
            answer = model(step, past_key_values=cache, use_cache=True)
            ids = torch.cat([ids, answer.logits[:, -1:].argmax(-1)], dim=1)
            cache = getattr(answer, "past_key_values", None)
            step = ids if cache is None else ids[:, -1:]
        results.append(Outputs(ids, _logits(model, ids), batch.shape[1]))
    return results


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits[0].to(torch.float32)


def _against(outputs: list[Outputs], model: nn.Module, exact: bool) -> Iterator[Check]:
    """Hold an artifact's outputs against the reference model, which reads the same texts."""
    difference = size = 0.0
    same = agreed = tokens = 0
    equal = True
    for output in outputs:
        expected = _logits(model, output.ids)
        equal &= torch.equal(expected, output.logits)
        difference += float((expected - output.logits).square().sum())
        size += float(expected.square().sum())
        at = expected[output.prompt - 1 : -1]  # what each generated token was chosen by
        chosen = output.ids[0, output.prompt :]
        best = at.amax(-1)
        behind = best - at.gather(-1, chosen[:, None])[:, 0]
        same += int((at.argmax(-1) == chosen).sum())
        agreed += int((behind <= _TIE * (best - at.amin(-1))).sum())
        tokens += chosen.numel()
    error = (difference / size) ** 0.5 if size else 0.0
    texts = f"{len(outputs)} prompts, {sum(output.ids.shape[1] for output in outputs)} positions"
    if not exact:
        yield Check(
            "against 8-bit activations",
            f"logits {error:.1e} off, {same} of {tokens} greedy tokens the same: this format does not "
            "quantize activations, as training did",
            done=False,
        )
        return
    wrong = [] if equal else [f"logits differ, by {error:.1e} of their norm"]
    yield Check("logits", f"{texts}, float32, bit for bit", wrong)
    wrong = [] if agreed == tokens else [f"{tokens - agreed} of {tokens} greedy tokens differ"]
    yield Check("greedy tokens", f"{tokens}", wrong)


# How each format becomes a model that runs


def _load(checkpoint: TernaryCheckpoint, dtype: torch.dtype) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.companions, local_files_only=True)
    named = (checkpoint.config.get("architectures") or [""])[0]
    kind = getattr(transformers, named, transformers.AutoModelForCausalLM)
    gc.collect()  # the model before this one
    with torch.compiler.set_stance("force_eager"):  # transformers compiles its unpacking
        model = kind.from_pretrained(checkpoint.folder, config=config, dtype=dtype, local_files_only=True)
    return model.eval()


def _eager(model: nn.Module) -> nn.Module:
    """The same model without torch.compile, which needs a C++ compiler."""
    forward = model.forward

    def uncompiled(*args: Any, **kwargs: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return forward(*args, **kwargs)

    model.forward = uncompiled
    return model


def _trained(latents: TernaryCheckpoint) -> nn.Module:
    """Latents in bfloat16, which have the same codes, in BitLinear layers; the rest in float32."""
    model = _load(latents, torch.bfloat16)
    head = model.get_output_embeddings()  # type: ignore[operator]
    skip = [name for name in latents.names.dense if model.get_submodule(name) is not head]
    ternary = {f"{name}.weight" for name in convert_to_bitlinear(model, skip, fuse=False)}
    return _rest_in_float32(model, ternary)


def _dense_arithmetic(latents: TernaryCheckpoint) -> nn.Module:
    """The trained codes and scales as dense bfloat16 matrices, computed in float32."""
    model = _load(latents, torch.bfloat16)
    for name in latents.names.converted:
        weight = model.get_submodule(name).get_parameter("weight")
        weight.data = dequantize(*latents.codes(name)).to(torch.bfloat16)
    return _rest_in_float32(model, set())


def _rest_in_float32(model: nn.Module, ternary: set[str]) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name not in ternary:
            parameter.data = parameter.data.to(torch.float32)
    return model


_LOADERS: dict[str, Callable[[TernaryCheckpoint], nn.Module]] = {
    "latents": _trained,
    "packed": lambda packed: _eager(_load(packed, torch.float32)),
    "dense": lambda dense: _load(dense, torch.float32),
}
