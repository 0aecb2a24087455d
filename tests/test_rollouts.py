"""What is pushed to vLLM, by TRL's own code, to stand-ins for its client and for its engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("trl")

from accelerate import Accelerator
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration as Generation

from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.plugin.upstream.trl_vllm import dense_ternary, push_dense_ternary

MakeModel = Callable[..., nn.Module]


class Vllm:
    """A vLLM server's client and an engine's model in one: it keeps what it is given, in order."""

    def __init__(self) -> None:
        self.given: list[tuple[str, Tensor]] = []
        self.announced: list[tuple[str, str, list[int]]] | None = None
        self.resets = 0

    def update_named_param(self, name: str, weights: Tensor) -> None:  # TRL 1.9, server
        self.given.append((name, weights.clone()))

    def update_named_params(self, metadata: Any, named_params: Iterable[tuple[str, Tensor]]) -> None:
        self.announced = metadata  # TRL 1.14, server
        self.load_weights(named_params)

    def batch_update_named_params(self, params: Any, chunk_size: int | None = None) -> None:
        self.load_weights(params)  # Axolotl's addition, server

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:  # an engine's model
        self.given += [(name, value.clone()) for name, value in weights]

    def reset_prefix_cache(self) -> None:
        self.resets += 1


def generation_of(model: nn.Module, mode: str) -> tuple[Any, Vllm]:
    """TRL's VLLMGeneration as its __init__ leaves it, with a stand-in in the place of vLLM."""
    generation, vllm = Generation.__new__(Generation), Vllm()
    accelerator = Accelerator(cpu=True)
    generation.model, generation.accelerator, generation.mode = model, accelerator, mode
    generation._dist = DistributedBackend(accelerator)
    generation.enable_sleep_mode, generation._weight_metadata = False, None
    stand_in(generation, vllm)
    return generation, vllm


def stand_in(generation: Any, vllm: Vllm) -> None:
    generation.vllm_client = vllm
    runner = SimpleNamespace(model=vllm)
    executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
    engine = SimpleNamespace(model_executor=executor)
    generation.llm = SimpleNamespace(llm_engine=engine, reset_prefix_cache=vllm.reset_prefix_cache)


def assert_pushed(vllm: Vllm, model: nn.Module, oracle: Any) -> None:
    """Every quantity that was pushed: names in order, shapes, dtypes, and each value by the definition."""
    parameters = dict(model.named_parameters())
    ternary = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, BitLinear)}
    assert [name for name, _ in vllm.given] == list(parameters)
    for name, value in vllm.given:
        latent = parameters[name].detach()
        assert value.dtype == latent.dtype and value.shape == latent.shape and not value.requires_grad
        if name in ternary:
            codes, s = oracle.weights(latent)
            wanted = torch.from_numpy(codes.astype(np.float32) / np.float32(s)).to(latent.dtype)
            assert torch.equal(value, wanted), name
            assert not torch.equal(value, latent), f"{name}: the latents were pushed"
        else:
            assert torch.equal(value, latent), name
    assert len(ternary) == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["server", "colocate"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_sync_pushes_codes_over_s_and_nothing_else_changes(
    mode: str, tied: bool, dtype: torch.dtype, tiny_model: MakeModel, oracle: Any
) -> None:
    model = tiny_model("Llama", tie_word_embeddings=tied, attention_bias=True).to(dtype)
    convert_to_bitlinear(model)
    generation, vllm = generation_of(model, mode)
    push_dense_ternary(generation, model)
    latents = {name: value.detach().clone() for name, value in model.named_parameters()}
    for sync in (1, 2):
        vllm.given.clear()
        generation.sync_weights()
        assert_pushed(vllm, model, oracle)
        assert vllm.resets == sync
        for name, value in model.named_parameters():
            assert torch.equal(value, latents[name])  # the policy itself is only read
            value.data.add_(torch.randn_like(value) * 0.02)  # a step
        latents = {name: value.detach().clone() for name, value in model.named_parameters()}
    if vllm.announced is not None:
        assert [tuple(entry[::2]) for entry in vllm.announced] == [
            (name, list(value.shape)) for name, value in vllm.given
        ]
        assert {entry[1] for entry in vllm.announced} == {str(dtype).removeprefix("torch.")}


def test_only_this_generation_is_changed(tiny_model: MakeModel) -> None:
    ternary, dense = tiny_model("Llama"), tiny_model("Llama")
    convert_to_bitlinear(ternary)
    push_dense_ternary(generation_of(ternary, "server")[0], ternary)
    generation, vllm = generation_of(dense, "colocate")
    generation.sync_weights()
    for (name, value), (own, parameter) in zip(vllm.given, dense.named_parameters(), strict=True):
        assert name == own and torch.equal(value, parameter)


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_axolotls_own_sync_does_not_get_past(
    mode: str, tiny_model: MakeModel, oracle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Axolotl 0.19 puts a sync_weights on the class that pushes the parameters straight away."""
    patches = pytest.importorskip("axolotl.monkeypatch.trainer.trl_vllm")
    if not hasattr(patches, "_make_batched_sync_weights"):
        pytest.skip("this Axolotl leaves sync_weights alone")
    for _ in range(2):  # once for each model that it loads
        patched = patches._make_batched_sync_weights(Generation.sync_weights)
        monkeypatch.setattr(Generation, "sync_weights", patched)
    model = tiny_model("Llama")
    convert_to_bitlinear(model)
    generation, vllm = generation_of(model, mode)
    push_dense_ternary(generation, model)
    generation.sync_weights()
    assert_pushed(vllm, model, oracle)


def test_a_sync_that_passes_weights_by_ends_the_run(tiny_model: MakeModel) -> None:
    model = tiny_model("Llama")
    convert_to_bitlinear(model)

    class Bypass(Generation):  # type: ignore[misc, valid-type]
        def sync_weights(self) -> None:
            self.vllm_client.load_weights(self.model.named_parameters())

    generation, _ = generation_of(model, "server")
    generation.__class__ = Bypass
    push_dense_ternary(generation, model)
    with pytest.raises(RuntimeError, match=r"14 ternary weights did not reach vLLM.*layers\.0\.mlp"):
        generation.sync_weights()


def test_sleep_is_refused_where_waking_reloads_the_base(tiny_model: MakeModel) -> None:
    model = tiny_model("Llama")
    convert_to_bitlinear(model)
    generation, _ = generation_of(model, "colocate")
    generation.enable_sleep_mode = True
    with pytest.raises(RuntimeError, match="vllm_enable_sleep_mode"):
        push_dense_ternary(generation, model)
    generation._llm_weights_sleeping = True  # TRL 1.14, which pushes the weights again instead
    push_dense_ternary(generation, model)


def test_an_unknown_trl_is_refused(tiny_model: MakeModel) -> None:
    class Other:
        enable_sleep_mode = False

        def sync_weights(self) -> None: ...

    with pytest.raises(RuntimeError, match="not known here"):
        push_dense_ternary(Other(), tiny_model("Llama"))


@pytest.mark.parametrize("shape", [(4, 1), (36, 17), (128, 64)])
def test_dense_ternary_is_the_definition(shape: tuple[int, int], oracle: Any) -> None:
    weight = torch.randn(shape) * 0.3
    codes, s = oracle.weights(weight)
    assert np.array_equal(dense_ternary(weight).numpy(), codes.astype(np.float32) / np.float32(s))
    assert dense_ternary(weight.to(torch.float16)).dtype == torch.float16


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_a_grpo_run_pushes_before_it_generates_and_after_every_step(
    mode: str, tmp_path: Path, tiny_model: MakeModel, oracle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole Axolotl run; vLLM's place is taken by a dense model that only knows what was pushed."""
    pytest.importorskip("axolotl.cli")
    from transformers import AutoModelForCausalLM

    from support.methods import STEPS, grpo_block, save_base, settings_of
    from support.runs import train

    base = save_base(tiny_model, tmp_path / "base")
    engine = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    vllm, syncs = Vllm(), 0

    def generate(self: Any, prompts: list[list[int]], **_: Any) -> tuple[Any, ...]:
        nonlocal syncs
        if vllm.given:
            syncs += 1
            assert_pushed(vllm, self.model, oracle)
            engine.load_state_dict(dict(vllm.given))
            vllm.given.clear()
        completions, logprobs = [], []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            for _ in range(4):
                scores = engine(ids).logits[0, -1].log_softmax(-1)
                ids = torch.cat([ids, scores.exp().multinomial(1)[None]], 1)
            tokens = ids[0, len(prompt) :]
            scores = engine(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            completions.append(tokens.tolist())
            logprobs.append([[float(row[token])] for row, token in zip(scores, tokens, strict=True)])
        return prompts, completions, logprobs, None

    monkeypatch.setattr(Generation, "_init_vllm", lambda self: stand_in(self, vllm))
    monkeypatch.setattr(Generation, "generate", torch.no_grad()(generate))
    block = grpo_block(
        use_vllm=True, vllm_mode=mode, vllm_server_host="localhost", vllm_server_port=8000, beta=None
    )
    keys = {"vllm": {"max_model_len": 64, "gpu_memory_utilization": 0.1, "tensor_parallel_size": 1}}
    run = train(settings_of("grpo", tmp_path, base, trl=block, **keys))
    assert syncs == STEPS and len(set(run.losses)) > 1
    assert run.trainer.ref_model is None  # without beta there is nothing to replace
    # Weights are the policy's to the bit; activations are not 8 bits here, so ratios are near 1, not equal
    ratios = run.logged("sampling/importance_sampling_ratio/mean")
    assert len(ratios) == STEPS and all(0.9 < ratio < 1.1 for ratio in ratios)
