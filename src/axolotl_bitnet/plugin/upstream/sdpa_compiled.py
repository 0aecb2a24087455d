"""Axolotl's attention for packed rows, in layers that are compiled.

Replaced: the attention that Axolotl has registered with transformers as "sdpa". Run on axolotl 0.19 and 0.21,
transformers 5.16 and 5.20. Test: tests/test_sdpa_compiled.py.

Axolotl's reads from the GPU, in every layer, whether rows are packed; a compiler stops there. Here the
decoder asks before its layers, and gives them the answer as the keywords that transformers has for it
(``cu_seq_lens_q`` and its like), by which the attention goes. It calls what Axolotl's does: ``varlen_attn``
for packed rows, transformers' own for others. Models that are not compiled ask as before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .sdpa_varlen import SYMBOLS, find


def ask_before_the_layers(*models: Any) -> bool:
    """Let the decoders of transformers models find out what is packed, and their attention go by that.

    Returns:
        Whether its attention is Axolotl's for packed rows; another is left as it is.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    asking = ALL_ATTENTION_FUNCTIONS["sdpa"]
    stock = getattr(asking, "_axolotl_sdpa_original", None)
    if stock is None or any(find(*symbol) is None for symbol in SYMBOLS):
        return False
    attention = partial(_attention, asking, stock)
    vars(attention)["_axolotl_sdpa_original"] = stock
    ALL_ATTENTION_FUNCTIONS.register("sdpa", attention)
    for model in models:
        model.base_model.register_forward_pre_hook(_with_lengths, with_kwargs=True)
    return True


def _with_lengths(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook: keywords with the lengths of the conversations in packed rows."""
    ids = kwargs.get("position_ids")
    if ids is None or "cu_seq_lens_q" in kwargs:
        return args, kwargs
    is_packed, lengths_of = (find(*symbol) for symbol in SYMBOLS)
    if not is_packed(ids):
        return args, kwargs
    (first_q, first_k), (longest_q, longest_k) = lengths_of(ids if ids.dim() > 1 else ids[None])
    lengths = {"cu_seq_lens_q": first_q.to(torch.int32), "cu_seq_lens_k": first_k.to(torch.int32)}
    longest = {"max_length_q": int(longest_q), "max_length_k": int(longest_k)}
    return args, kwargs | lengths | longest


def _attention(
    asking: Callable[..., Any],
    stock: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    """As Axolotl's, but told by keywords whether rows are packed, and of what lengths."""
    first_q, first_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if first_q is None and not torch.compiler.is_compiling():
        return asking(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    batch, heads, length, size = query.shape
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
    plain = scaling is None or abs(scaling - size**-0.5) < 1e-9
    fits = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and size <= 256
    if attention_mask is None and first_q is not None:
        if fits and plain and not dropout:
            from torch.nn.attention.varlen import varlen_attn

            repeats = heads // key.shape[1]
            if repeats > 1:
                key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
            q, k, v = (x.transpose(1, 2).reshape(batch * length, heads, size) for x in (query, key, value))
            longest_q, longest_k = kwargs["max_length_q"], kwargs["max_length_k"]
            before = window - 1 if window else -1
            rows: Any = varlen_attn(q, k, v, first_q, first_k, longest_q, longest_k, window_size=(before, 0))
            return rows.reshape(batch, length, heads, size), None
        attention_mask = _same_conversation(kwargs["position_ids"])
    return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _same_conversation(position_ids: Tensor) -> Tensor:
    """bool (batch, 1, length, length): which tokens see which, in rows whose positions begin again at 0."""
    number = (position_ids == 0).cumsum(-1)
    place = torch.arange(position_ids.shape[-1], device=position_ids.device)
    same = number[:, :, None] == number[:, None, :]
    return (same & (place[:, None] >= place))[:, None]
