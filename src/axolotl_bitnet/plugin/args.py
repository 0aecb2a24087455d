"""The config: `use_onebitllms` and the `bitnet:` block, and every combination that is refused, with its
reason.

Axolotl mixes :class:`BitNetArgs` into its own config class and runs the validator here on all keys, before
anything is loaded. Without ``use_onebitllms: true`` only a ``bitnet:`` block is refused, because the run
would train dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..formats.registry import FORMATS
from ..training.log import warn
from .refusals import fsdp_refusals, refusals
from .upstream.falcon_fsdp import let_llama_falcons_shard as _let_llama_falcons_shard

if TYPE_CHECKING:
    ExportName = str
else:
    ExportName = Literal[tuple(FORMATS)]


class BitNetConfig(BaseModel):
    """The `bitnet:` block. Everything in it is optional."""

    model_config = ConfigDict(extra="forbid")

    learning_rate_multiplier: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        json_schema_extra={"description": "Effective learning rate = learning_rate x this, applied once."},
    )
    learning_rate_scope: Literal["all", "ternary"] = Field(
        default="all",
        json_schema_extra={
            "description": "What the multiplier reaches: all parameters, or BitLinear weights only."
        },
    )
    latent_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        json_schema_extra={"description": "Precision of the latent weights that the optimizer updates."},
    )
    skip_modules: list[str] = Field(
        default_factory=list,
        json_schema_extra={
            "description": "Linear layers left dense beside the output head: names, ends, parents or globs."
        },
    )
    fuse: bool = Field(
        default=True,
        json_schema_extra={
            "description": "Fuse Llama-shaped MLPs and norms with the quantization behind them: same codes."
        },
    )
    backward: Literal["bf16", "int8_dx", "int8"] = Field(
        default="bf16",
        json_schema_extra={
            "description": "Precision of the backward's products: bf16, int8_dx (inputs' gradients) or int8."
        },
    )
    gather: Literal["auto", "ternary", "native"] = Field(
        default="auto",
        json_schema_extra={
            "description": "What FSDP2 gathers: 2-bit codes (auto: where it can), or weights as they are."
        },
    )
    ramp_steps: int = Field(
        default=0,
        ge=0,
        json_schema_extra={
            "description": "Steps from the dense model to the ternary one, for bases that were never ternary."
        },
    )
    teacher: str | None = Field(
        default=None,
        min_length=1,
        json_schema_extra={
            "description": "A frozen dense model whose answers are learned: base, or a path or hub name."
        },
    )
    teacher_temperature: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        json_schema_extra={"description": "Temperature of both softmaxes in the teacher's loss."},
    )
    teacher_weight: float = Field(
        default=1.0,
        gt=0,
        le=1,
        json_schema_extra={"description": "Weight of the teacher's loss; the rest is cross-entropy."},
    )
    start: Literal["base", "stretch"] = Field(
        default="base",
        json_schema_extra={
            "description": "Latents to begin with: the base's weights, or those fitted to the ternary grid."
        },
    )
    monitor: bool = Field(
        default=True,
        json_schema_extra={
            "description": "Log flips, zeros, scale drift and oscillation of the codes, and warn."
        },
    )
    export: list[ExportName] = Field(
        default_factory=lambda: ["packed"],
        json_schema_extra={"description": "Artifacts made after training; [] for none."},
    )
    verify: bool = Field(
        default=True,
        json_schema_extra={
            "description": "Compare every artifact with the fingerprint of the trained model."
        },
    )

    @model_validator(mode="before")
    @classmethod
    def accept_int8_grad(cls, data: Any) -> Any:
        """The former name of ``backward: int8_dx`` is accepted, with a warning, until version 0.4."""
        if not isinstance(data, Mapping) or "int8_grad" not in data:
            return data
        if "backward" in data:
            raise ValueError("`bitnet.backward` replaces `bitnet.int8_grad`: remove `int8_grad`")
        if not isinstance(data["int8_grad"], bool):
            raise ValueError(f"`bitnet.int8_grad` is true or false, not {data['int8_grad']!r}")
        renamed = with_backward(data)
        warn(
            f"`bitnet.int8_grad: {str(data['int8_grad']).lower()}` is now `bitnet.backward: "
            f"{renamed['backward']}`; the old key goes with version 0.4"
        )
        return renamed


def with_backward(block: Mapping[str, Any]) -> dict[str, Any]:
    """A `bitnet:` block of a config or a checkpoint, with ``backward`` in place of ``int8_grad``."""
    renamed = dict(block)
    if "int8_grad" in renamed:
        renamed["backward"] = "int8_dx" if renamed.pop("int8_grad") else "bf16"
    return renamed


class BitNetArgs(BaseModel):
    """Keys that the plugin adds to Axolotl's config."""

    use_onebitllms: bool | None = Field(
        default=None, json_schema_extra={"description": "Train ternary (1.58-bit) weights."}
    )
    bitnet: BitNetConfig | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Runs on Axolotl's merged class, before pydantic collects its validators."""
        super().__init_subclass__(**kwargs)
        _let_llama_falcons_shard(cls)

    @model_validator(mode="before")
    @classmethod
    def refuse_what_cannot_work(cls, data: Any) -> Any:
        """Raise ValueError with the reason, and what to do instead."""
        if not isinstance(data, Mapping):
            return data
        if not data.get("use_onebitllms"):
            if data.get("bitnet") is not None:
                raise ValueError(
                    "the config has a `bitnet:` block but not `use_onebitllms: true`: it would train "
                    "a dense model. Add `use_onebitllms: true`, or remove the block"
                )
            return data
        if problems := refusals(data):
            raise ValueError("; ".join(problems))
        return data

    @model_validator(mode="after")
    def refuse_under_fsdp(self) -> BitNetArgs:
        """After Axolotl's own validators, which set a missing version (1 in 0.19, 2 in 0.21)."""
        values = vars(self)  # reading the deprecated `fsdp` as an attribute would warn
        if self.use_onebitllms and (problems := fsdp_refusals(values)):
            raise ValueError("; ".join(problems))
        return self
