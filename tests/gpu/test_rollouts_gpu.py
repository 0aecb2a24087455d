"""A policy in training that generates from 2-bit weights on a GPU: the tokens of its own layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.serving.rollouts import packed_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rollouts_are_the_policy_s_bit_for_bit(dtype: torch.dtype, fuse: bool) -> None:
    """From one sequence to more than the kernels for a few rows take; before and after an optimizer step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=576, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=128,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    convert_to_bitlinear(model, fuse=fuse)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)

    def answers(sequences: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(sequences)
        ids = torch.randint(1, 128, (sequences, 7), device="cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0,
                eos_token_id=None, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        return found.sequences, torch.stack(found.logits)

    for _ in range(2):
        for sequences in (1, 5, 20):
            tokens, logits = answers(sequences)
            with packed_layers(model) as count:
                assert count == 14
                packed = answers(sequences)
            assert torch.equal(packed[1], logits) and torch.equal(packed[0], tokens)
        ids = torch.randint(1, 128, (2, 16), device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
