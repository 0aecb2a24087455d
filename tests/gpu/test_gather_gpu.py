"""FSDP2's all-gather in 2 bits over NCCL: a Llama's run is the one with FSDP2's own, to the bit."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import GradientState

from axolotl_bitnet import convert_to_bitlinear
from axolotl_bitnet.layers.weight_codes import forget_weight_codes, keep_weight_codes
from axolotl_bitnet.model.fingerprint import fingerprint_model
from axolotl_bitnet.training.fsdp2_gather import gather_ternary
from axolotl_bitnet.training.keep_gathered import keep_gathered

WORLD = 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two CUDA GPUs"),
]
CASES: list[dict[str, Any]] = [
    {},
    {"bf16": True},
    {"bf16": True, "reshard": False, "checkpointing": True},
    {"bf16": True, "offload": True},
    {"bf16": True, "compile": True},
    {"bf16": True, "backward": "int8", "checkpointing": True},
    {"bf16": True, "keep": True, "checkpointing": True},
    {"bf16": True, "keep": True, "compile": True, "backward": "int8"},
]


def run(gather: str, bf16: bool = False, reshard: bool = True, **how: Any) -> list[Any]:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1368, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=1000, max_position_embeddings=512, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    names = convert_to_bitlinear(model, backward=how.get("backward", "bf16"))
    if how.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    settings: dict[str, Any] = {"reshard_after_forward": reshard}
    if bf16:
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    if how.get("offload"):
        settings["offload_policy"] = CPUOffloadPolicy()
    for layer in model.model.layers:
        fully_shard(layer, **settings)
        if how.get("compile"):
            layer.compile()
    fully_shard(model, **settings)
    model.train()
    if gather == "ternary":
        assert gather_ternary(model) == len(names)
        if how.get("keep"):
            assert keep_gathered(model) == len(model.model.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=not how.get("offload"))
    ids = torch.randint(1000, (2, 200), generator=torch.Generator().manual_seed(dist.get_rank())).cuda()
    seen: list[Any] = []
    for _ in range(4):
        if how.get("keep"):
            keep_weight_codes(whole=False)
        for last in (False, True) if how.get("keep") else (True,):
            GradientState()._set_sync_gradients(last)
            loss = model(ids, labels=ids).loss
            loss.backward()
            seen.append(loss.item())
        forget_weight_codes()
        seen += [parameter.grad.to("cuda").full_tensor().cpu() for parameter in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        seen.append(fingerprint_model(model).digest)
    return seen


def worker(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", rendezvous, timedelta(seconds=120), world_size=WORLD, rank=rank
    )
    try:
        for index, case in enumerate(CASES):
            native, ternary = run("native", **case), run("ternary", **case)
            torch._dynamo.reset()
            torch.save((native, ternary), Path(folder) / f"{index}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gather")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_a_run_is_the_native_one_to_the_bit(runs: Path, index: int) -> None:
    for rank in range(WORLD):
        native, ternary = torch.load(runs / f"{index}-{rank}.pt")
        assert len({entry for entry in native if isinstance(entry, str)}) == 4  # every step flipped codes
        for one, other in zip(native, ternary, strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
