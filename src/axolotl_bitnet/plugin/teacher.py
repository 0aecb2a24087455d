"""A run's teacher and its start: refusals that depend on the models, and how both are set up."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..storage.atomic import CheckpointError
from ..storage.safetensors_stream import CheckpointReader
from ..training.log import info
from .args import BitNetConfig
from .base_model import holds_latents, local_folder
from .resume import ResumeError, recorded

_SAMPLE = 4096
"""Elements of each tensor that a base's hash is of: another training changes every one."""


def check_teacher(cfg: Any, options: BitNetConfig) -> None:
    """Refuse a teacher or a start that the base's files exclude, before weights are read.

    Raises:
        TeacherError, StretchError: the message has the reason, and what to do.
    """
    from ..training.stretch import StretchError
    from ..training.teacher import TeacherError

    if options.start == "stretch" and holds_latents(cfg):
        raise StretchError(
            f"{cfg.base_model} holds the latents of a ternary model, which are on their grid: "
            "`bitnet.start: stretch` is for dense bases. Remove it"
        )
    if not options.teacher:
        return
    source = _source(cfg, options)
    if holds_latents(source):
        asked = f"`bitnet.teacher: {options.teacher}`"
        raise TeacherError(
            f"{asked}: {source.base_model} holds the latents of a ternary model, and computed dense they are "
            "another one. Name a dense model, or the dense export of that one"
        )


def load_teacher(cfg: Any, options: BitNetConfig, trainer: Any) -> Any:
    """Set up the teacher; the trainer's model learns from it from now on.

    Raises:
        TeacherError: it is quantized, or has another tokenizer, vocabulary or kind of head.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..training.teacher import Teacher, TeacherError, refuse_other_heads, teach

    source = _source(cfg, options)
    name, revision = source.base_model, source.revision_of_model
    config = AutoConfig.from_pretrained(name, revision=revision)
    if getattr(config, "quantization_config", None) is not None:
        raise TeacherError(f"the teacher {name} is quantized: take it in bfloat16")
    if options.teacher != "base":
        _refuse_other_words(name, trainer.processing_class)
    with _every_rank_loads():
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=cfg.torch_dtype,
            attn_implementation=getattr(trainer.model.config, "_attn_implementation", None),
        )
    refuse_other_heads(model)
    teacher = Teacher(model, options.teacher_temperature, options.teacher_weight)
    teach(trainer.model, teacher)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    info(
        "%s teaches: %.2g of the loss is KL(teacher || student) at temperature %g; its weights take %.1f GiB",
        name,
        options.teacher_weight,
        options.teacher_temperature,
        size / 2**30,
    )
    return teacher


def start_of(cfg: Any, resumed: Path | None) -> dict[str, Any]:
    """What a run with ``bitnet.start: stretch`` records: the base's hash, and what a resumed one had.

    Raises:
        ResumeError: the checkpoint began at another base.
    """
    base = hash_of(local_folder(cfg))
    saved = (recorded(resumed) or {}).get("stretch") if resumed is not None else None
    if saved is None:
        return {"base": base}
    if saved["base"] != base:
        raise ResumeError(
            f"{resumed} began with latents stretched from another base than {cfg.base_model}: its ramp leads "
            "away from that one. Set base_model back, or start a new run"
        )
    return saved


def hash_of(folder: Path | None) -> str | None:
    """SHA-256 of a checkpoint's tensors: names, shapes, dtypes, and some elements of each. None without
    safetensors."""
    if folder is None:
        return None
    try:
        reader = CheckpointReader(folder)
    except CheckpointError:
        return None
    digest = hashlib.sha256()
    for name, entry in sorted(reader.entries.items()):
        tensor = reader.tensor(name).flatten()[:_SAMPLE].contiguous()
        digest.update(f"{name} {entry.dtype} {tuple(entry.shape)}".encode())
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()


def _source(cfg: Any, options: BitNetConfig) -> Any:
    """The teacher's name as a config's base."""
    if options.teacher == "base":
        return cfg
    return SimpleNamespace(base_model=options.teacher, revision_of_model=None)


def _refuse_other_words(name: str, tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    from ..training.teacher import TeacherError

    if AutoTokenizer.from_pretrained(name).get_vocab() != tokenizer.get_vocab():
        raise TeacherError(
            f"the teacher {name} has another tokenizer than the model: its words are not the model's. "
            "Choose a teacher of the same family"
        )


@contextmanager
def _every_rank_loads() -> Iterator[None]:
    """With FSDP's cpu_ram_efficient_loading, transformers loads weights on one rank only, and FSDP sends them
    to the others; nothing sends the teacher's."""
    key = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    held = os.environ.get(key)
    os.environ[key] = "false"
    try:
        yield
    finally:
        if held is None:
            del os.environ[key]
        else:
            os.environ[key] = held
