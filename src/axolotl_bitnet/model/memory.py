"""Peak memory of a training step on one GPU, from the model's outline and a few settings: arithmetic only.

    peak = max(backward, optimizer)
    backward  = weights + gradients + moments + kept codes + saved activations + work
    optimizer = weights + gradients + moments + temporary tensors

What each is made of is in :func:`step_memory`. The numbers of bytes were read off the code that allocates
them, and those of the head and of the residual stream set by `benchmarks/memory.py` and
`benchmarks/in_the_run.py` (Axolotl 0.19, torch 2.11, Falcon-E's shapes with random weights, H100 and H200),
without checkpointing by `experiments/convert_cost.py` (Qwen3's shapes); docs/which-gpu.md has the rows beside
the formula. Not measured: models whose MLP needs more than their head, DDP, several replicas.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .outline import Outline

GIB = 2**30
RESERVED = 1.12
"""What the allocator reserves is 1.01 to 1.14 of the peak that it hands out, 1.06 in the median."""

CONTEXT = 0.8 * GIB
"""CUDA's own, and NCCL's."""

_EIGHT_BIT = 1 + 4 / 256  # a code, and a float32 scale for each block of 256
_FEW_TOKENS = 8191  # as axolotl_bitnet.layers.weight_codes, which imports torch, has it
_FIXED = 0.09 * GIB  # workspaces of the libraries
_CHUNK = 0.9 * GIB  # logits of a chunk, and the gradient of the head, where the loss is made in chunks


@dataclass(frozen=True)
class Settings:
    """The settings of a config that decide memory.

    Attributes:
        tokens: of a micro-batch on one GPU; both answers of a preference pair count.
        latent_bytes: of a latent and its gradient, 2 or 4.
        moment_bytes: of AdamW's two moments of a weight together.
        foreach: the optimizer makes a temporary tensor of each weight's size (`adamw_torch`).
        checkpointing: activations are computed again in the backward pass.
        accumulates: a step has several micro-batches, so gradients are there while activations are.
        sharding: "fsdp2" or "ddp".
        frozen: parameters of a second model in bfloat16: a preference method's reference, or a teacher.
        compiled: `torch_compile: true`.
        loss: "plain" (transformers'), "compiled", "preference" (TRL's), or "chunked" (a teacher's, Liger's
            fused one, cut cross-entropy).
    """

    tokens: int
    latent_bytes: int = 4
    moment_bytes: float = 8.0
    foreach: bool = False
    checkpointing: bool = True
    accumulates: bool = True
    sharding: str = "fsdp2"
    frozen: int = 0
    compiled: bool = False
    loss: str = "plain"


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    gradients: float
    moments: float
    frozen: float
    codes: float
    activations: float
    work: float
    peak: float

    @property
    def needed(self) -> float:
        """What the GPU must have: the allocator's reserve and the libraries' own memory too."""
        return self.peak * RESERVED + CONTEXT

    def to_json(self) -> dict[str, float]:
        return {**asdict(self), "needed": self.needed}


def moment_bytes(optimizer: str, latent_bytes: int) -> float:
    """Bytes of AdamW's two moments of a weight, by the optimizer's name in Axolotl."""
    if optimizer == "adamw_torch_4bit":
        return 2 * (0.5 + 4 / 128)
    return 2 * _EIGHT_BIT if "8bit" in optimizer else 2.0 * latent_bytes


def step_memory(outline: Outline, settings: Settings, gpus: int) -> Memory:
    """Memory of each of ``gpus`` GPUs.

    - *Weights, gradients, moments*: of every parameter, divided by the GPUs under FSDP2. Without FSDP2
      Axolotl keeps embedding and head in float32 whatever the latents are.
    - *Kept codes*: a byte per ternary weight, from a step's first micro-batch to its optimizer step (in
      compiled layers only with micro-batches of few tokens); under FSDP2 a quarter of a byte, gathered.
    - *Saved activations*: with checkpointing each layer's input: float32, under FSDP2 bfloat16. Else what a
      layer saves.
    - *Work*: the larger of the head and one layer's backward; the head's bfloat16 copy; under FSDP2 what is
      gathered. The head: bfloat16 logits, their float32 copy in the model's outputs, and unless the loss is
      compiled two more in float32 (on one GPU one and a half). TRL's preference losses differentiate the
      logits row by row and gather the rows' gradients: two and a half more (measured with DPO).
    """
    shards = gpus if settings.sharding == "fsdp2" and gpus > 1 else 1
    sharded = shards > 1
    parameters, latent, tokens = outline.parameters, settings.latent_bytes, settings.tokens
    upcast = 0 if sharded or latent == 4 else 2 * outline.embedding  # Axolotl's float32 embedding and head
    weights = (latent * parameters + upcast) / shards
    gradients = (latent * parameters + upcast) / shards
    if settings.sharding == "ddp" and gpus > 1:
        gradients *= 2  # buckets to reduce them in
    moments = settings.moment_bytes * parameters / shards
    frozen = 2 * settings.frozen / shards
    byte = 0.25 if sharded else 0.0 if settings.compiled and tokens > _FEW_TOKENS else 1.0
    codes = byte * outline.ternary_weights
    if not (settings.accumulates or settings.checkpointing):
        codes = 0.0
    hidden, wide = outline.hidden, outline.intermediate
    if settings.checkpointing:
        activations = float((2 if sharded else 4) * hidden * outline.layers * tokens)
    else:
        a_layer = (4 + 2 * latent) * hidden + 2 * outline.attention + 3 * outline.queries + 4 * wide
        a_layer += 6 * outline.normed
        activations = float(a_layer * outline.layers * tokens)
    if settings.loss == "chunked":
        head = 10 * hidden * tokens + _CHUNK
    else:
        plain = 14 if sharded else 12
        logit = {"plain": plain, "compiled": 6, "preference": plain + 10}[settings.loss]
        head = (logit * outline.vocabulary + 10 * hidden) * tokens
    layer = (12 * wide + 32 * hidden) * tokens
    ternary_layer = outline.ternary_weights / max(outline.layers, 1)
    gathered = 2 * outline.embedding + ternary_layer if sharded else outline.embedding
    work = max(head, layer) + gathered
    held = weights + moments + frozen + _FIXED
    backward = held + codes + activations + work + (gradients if settings.accumulates else 0)
    temporary = latent * parameters / shards if settings.foreach else 0.0
    optimizer = held + gradients + temporary
    if not settings.accumulates:
        optimizer = max(optimizer, held + gradients + codes + gathered)  # the end of the backward pass
    peak = max(backward, optimizer)
    return Memory(weights, gradients, moments, frozen, codes, activations, work, peak)
