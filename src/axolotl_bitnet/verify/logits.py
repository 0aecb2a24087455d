"""Two stored models run on the same prompts, one after the other, so that only one is in memory.

The trained model is built from its latents with BitLinear layers, everything else rounded to bfloat16 and
computed in float32.

- A packed model computes the same numbers in plain transformers, to the bit.
- A dense one multiplies the same weights with activations that are not quantized. It is compared, to the bit,
  with the trained codes and scales computed so; its distance to the trained model's 8-bit activations is
  reported, not judged.
- mlx-lm computes as a dense one does, adding in another order.
- llama.cpp quantizes activations by blocks, which moves logits by about 1 %: each token that it chooses must
  be the trained model's choice, or nearly.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.checkpoint import TernaryCheckpoint
from ..formats.companions import needs_code
from ..formats.config_json import architecture_name
from ..model.convert import convert_to_bitlinear
from ..ternary import dequantize
from .engines import ENGINES, TOKENS, Outputs, consumer_of
from .report import Check

PROMPTS = (
    "The capital of France is",
    "What is 17 + 25?",
    "Once upon a time, in a small village by the sea,",
)
_TIE = 1e-4
"""Share of the range of a position's logits within which two tokens count as equal: a model that generates
with its cache adds in another order than one that reads the whole text."""

_LLAMA_CPP_TIE = 0.02
"""The same, where activations are quantized by blocks."""


_MLX_ERROR = 1e-4
"""Relative distance of logits within which mlx-lm computes the same model: it adds in another order."""


def compare_running(
    artifact: TernaryCheckpoint, reference: TernaryCheckpoint, prompts: Sequence[str]
) -> Iterator[Check]:
    """Logits and greedy tokens of an artifact compared with the trained model's. An error that a program
    raises while it loads or runs the artifact is a difference, in its words."""
    kind, trained = artifact.format.split("-")[0], reference.format
    if trained not in ("latents", "packed"):
        yield Check("running", f"{reference.folder} is {trained}, not the trained model", done=False)
        return
    if kind not in _LOADERS and kind not in ENGINES:
        yield Check("running", f"{artifact.format} is not run here", done=False)
        return
    if kind == "mlx" and trained != "latents":
        yield Check("running", "mlx-lm is compared with latents, which this reference has not", done=False)
        return
    if needs_code(artifact.config):
        yield Check("running", "not run: the model needs code of its own", done=False)
        return
    try:
        batches = _encode(reference if kind == "gguf" else artifact, prompts)
    except Exception as error:  # a third party's tokenizer may raise anything
        yield Check("running", f"no tokenizer to run with: {error}", done=False)
        return
    consumer = consumer_of(kind)
    try:
        if kind in ENGINES:
            outputs = ENGINES[kind][1](artifact.folder, batches)
        else:
            outputs = _generate(_LOADERS[kind](artifact), batches)
    except ImportError as error:
        yield Check("running", str(error), done=False)
        return
    except Exception as error:  # the program may raise anything
        words = " ".join(str(error).split()) or type(error).__name__
        yield Check("running", f"in {consumer}", [f"{consumer} cannot run it: {words}"])
        return
    yield from _judged(kind, outputs, reference)


def _judged(kind: str, outputs: list[Outputs], reference: TernaryCheckpoint) -> Iterator[Check]:
    """A program's outputs compared with the reference's."""
    trained = reference.format
    if kind == "mlx":
        yield _near(outputs, _expected(outputs, dense := _dense_arithmetic(reference)))
        yield _compare_tokens(outputs, _expected(outputs, dense), _TIE)
    if kind == "dense" and trained == "latents":
        yield from _compare(outputs, _expected(outputs, _dense_arithmetic(reference)))
    expected = _expected(outputs, _LOADERS[trained](reference))
    if kind == "gguf":
        yield _compare_tokens(outputs, expected, _LLAMA_CPP_TIE)
    elif kind in ("dense", "mlx"):
        yield _distance(outputs, expected)
    else:
        yield from _compare(outputs, expected)


def _encode(artifact: TernaryCheckpoint, prompts: Sequence[str]) -> list[Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        artifact.companions, local_files_only=True, trust_remote_code=False
    )
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


def _expected(outputs: list[Outputs], model: nn.Module) -> list[Tensor]:
    """The reference model's logits of the same texts."""
    return [_logits(model, output.ids) for output in outputs]


def _compare(outputs: list[Outputs], expected: list[Tensor]) -> Iterator[Check]:
    positions = sum(output.ids.shape[1] for output in outputs)
    same = all(
        output.logits is not None and torch.equal(output.logits, logits)
        for output, logits in zip(outputs, expected, strict=True)
    )
    wrong = [] if same else [f"logits differ, by {_error(outputs, expected):.1e} of their norm"]
    yield Check("logits", f"{len(outputs)} prompts, {positions} positions, float32, bit for bit", wrong)
    yield _compare_tokens(outputs, expected, _TIE)


def _near(outputs: list[Outputs], expected: list[Tensor]) -> Check:
    error = _error(outputs, expected)
    wrong = [] if error < _MLX_ERROR else [f"logits differ, by {error:.1e} of their norm"]
    positions = sum(output.ids.shape[1] for output in outputs)
    detail = f"{len(outputs)} prompts, {positions} positions, float32, within {_MLX_ERROR:.0e} of codes / s"
    return Check("logits", detail, wrong)


def _compare_tokens(outputs: list[Outputs], expected: list[Tensor], tie: float) -> Check:
    """Whether each chosen token was the reference's best, but for a share ``tie`` of its logits' range."""
    same = agreed = count = 0
    for output, logits in zip(outputs, expected, strict=True):
        before = logits[output.prompt - 1 : -1]  # what each generated token is chosen by
        chosen = output.ids[0, output.prompt :]
        best = before.amax(-1)
        behind = best - before.gather(-1, chosen[:, None])[:, 0]
        same += int((before.argmax(-1) == chosen).sum())
        agreed += int((behind <= tie * (best - before.amin(-1))).sum())
        count += chosen.numel()
    wrong = [f"{count - agreed} of {count} greedy tokens differ"] if agreed < count else []
    detail = f"{same} of {count} the same"
    if near := agreed - same:
        detail += f", {near} within {tie:.2%} of the best"
    if wrong:
        detail += f", {count - agreed} another"
    return Check("greedy tokens", detail, wrong)


def _distance(outputs: list[Outputs], expected: list[Tensor]) -> Check:
    detail = (
        f"logits {_error(outputs, expected):.1%} off: this format does not quantize activations, as training "
        "did"
    )
    return Check("8-bit activations", detail, done=False)


def _error(outputs: list[Outputs], expected: list[Tensor]) -> float:
    """Relative, over all prompts."""
    ours = torch.cat([output.logits for output in outputs if output.logits is not None])
    theirs = torch.cat(expected)
    return float((ours - theirs).norm() / theirs.norm())


# How each format becomes a model that runs


def _load(checkpoint: TernaryCheckpoint, dtype: torch.dtype) -> nn.Module:
    import transformers

    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(checkpoint.companions, **safe)
    kind = getattr(transformers, architecture_name(checkpoint.config), transformers.AutoModelForCausalLM)
    gc.collect()  # the model before this one
    with torch.compiler.set_stance("force_eager"):  # transformers compiles its unpacking
        model = kind.from_pretrained(checkpoint.folder, config=config, dtype=dtype, **safe)
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
