"""A teacher and a stretched start in real Axolotl runs on the CPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

pytest.importorskip("axolotl.cli")

from axolotl_bitnet.plugin.args import BitNetConfig
from axolotl_bitnet.plugin.refusals import fsdp_refusals, refusals
from axolotl_bitnet.plugin.resume import ResumeError
from axolotl_bitnet.plugin.teacher import load_teacher
from axolotl_bitnet.training.stretch import StretchError
from axolotl_bitnet.training.teacher import TeacherError
from support.methods import save_base
from support.runs import Run, config, train

OPTIONS = {"teacher": "base", "start": "stretch", "ramp_steps": 3}
RUN: dict[str, Any] = {
    "max_steps": 6,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "sample_packing": True,
    "eval_sample_packing": False,
    "pad_to_sequence_len": True,
    "attn_implementation": "sdpa",
    "eval_steps": 3,
    "save_steps": 2,
    "save_strategy": "steps",
    "val_set_size": 0.03,
    "bitnet": OPTIONS,
}


def dense_base(tiny_model: Callable[..., nn.Module], folder: Path, seed: int) -> Path:
    """A random model that has something to say: its answers depend on what it reads."""
    torch.manual_seed(seed)

    def sharp(*args: Any, **keys: Any) -> nn.Module:
        model = tiny_model(*args, **keys)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter *= 5
        return model

    return save_base(sharp, folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., nn.Module]) -> Path:
    return dense_base(tiny_model, tmp_path_factory.mktemp("base"), 5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, Run]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(config(folder, base, **RUN))


@pytest.mark.slow
def test_a_run_begins_at_its_teacher_and_ends_packed(whole: tuple[Path, Run]) -> None:
    folder, run = whole
    losses, kl = run.losses, run.logged("bitnet/kl")
    assert losses == pytest.approx(kl, rel=0.05, abs=1e-5)  # Trainers count a first token that none predicts
    assert abs(losses[0]) < 0.01 * losses[2]  # lambda is 0: the stretch is undone, the student is the teacher
    evaluated = [entry for entry in run.trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) >= 2 and sum("eval_teacher_loss" in entry for entry in evaluated) == 1
    assert all(entry["eval_loss"] > 3 for entry in evaluated)  # cross-entropy over 128 words, not KL
    record = json.loads((folder / "out" / "bitnet.json").read_text(encoding="utf-8"))
    assert record["artifacts"]["packed"]["verified"] is True
    state = json.loads((folder / "out" / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
    fits = state["stateful_callbacks"]["TernaryRun"]["args"]["settings"]["stretch"]
    assert len(fits["layers"]) == 14 and len(fits["base"]) == 64


@pytest.mark.slow
def test_resumed_within_the_ramp_it_is_the_uninterrupted_run(
    whole: tuple[Path, Run], base: Path, tmp_path: Path
) -> None:
    folder, run = whole
    resumed = train(
        config(tmp_path, base, **RUN | {"resume_from_checkpoint": str(folder / "out" / "checkpoint-2")})
    )
    assert resumed.losses == run.losses
    for (name, one), other in zip(run.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.slow
def test_compiled_layers_learn_the_same(whole: tuple[Path, Run], base: Path, tmp_path: Path) -> None:
    """In the ramp and after it, with evaluations between; the teacher's layers are compiled as well."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    keys = {"torch_compile": True, "torch_compile_backend": "eager"}
    try:
        run = train(config(tmp_path, base, **RUN | keys))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    finally:
        torch._dynamo.reset()
    assert graphs >= 4
    assert run.losses == pytest.approx(whole[1].losses, rel=1e-4)
    assert run.logged("bitnet/kl") == pytest.approx(whole[1].logged("bitnet/kl"), rel=1e-4)


@pytest.mark.slow
def test_another_base_is_not_resumed(
    whole: tuple[Path, Run], tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    other = dense_base(tiny_model, tmp_path / "other", 6)
    checkpoint = str(whole[0] / "out" / "checkpoint-2")
    with pytest.raises(ResumeError, match="another base"):
        train(config(tmp_path, other, **RUN | {"resume_from_checkpoint": checkpoint}))


@pytest.mark.slow
def test_latents_neither_teach_nor_are_stretched(whole: tuple[Path, Run], tmp_path: Path) -> None:
    latents = whole[0] / "out"
    for options, error in (({"teacher": "base"}, TeacherError), ({"start": "stretch"}, StretchError)):
        with pytest.raises(error, match="holds the latents of a ternary model"):
            train(config(tmp_path, latents, bitnet=options))


@pytest.mark.slow
def test_a_teacher_of_another_vocabulary_is_refused(
    base: Path, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    tiny_model("Llama", vocab_size=96).save_pretrained(tmp_path / "other")
    for path in base.glob("token*"):
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(TeacherError, match="has 96 words"):
        train(config(tmp_path, base, bitnet={"teacher": str(tmp_path / "other")}))


def as_teacher(base: Path, folder: Path) -> tuple[Path, Any]:
    """A copy of the base to be changed, and what loads it as the teacher of the base."""
    shutil.copytree(base, folder)
    options = BitNetConfig(teacher=str(folder))
    trainer = SimpleNamespace(processing_class=AutoTokenizer.from_pretrained(base), model=None)
    return folder, lambda: load_teacher(SimpleNamespace(), options, trainer)


def test_a_quantized_teacher_is_refused(base: Path, tmp_path: Path) -> None:
    folder, load = as_teacher(base, tmp_path / "quantized")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["quantization_config"] = {"quant_method": "bitnet"}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(TeacherError, match="is quantized"):
        load()


def test_a_teacher_with_other_words_is_refused(base: Path, tmp_path: Path) -> None:
    """As many words, two of them exchanged: the vocabulary's size does not show it."""
    folder, load = as_teacher(base, tmp_path / "other")
    words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = words["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    with pytest.raises(TeacherError, match="another tokenizer"):
        load()


TAUGHT = {"use_onebitllms": True, "bitnet": {"teacher": "base"}}
STRETCHED = {"use_onebitllms": True, "bitnet": {"start": "stretch"}}


@pytest.mark.parametrize(
    "keys, words",
    [
        (TAUGHT | {"rl": "dpo"}, "ranks answers"),
        (TAUGHT | {"deepspeed": {"zero_optimization": {"stage": 2}}}, "Use FSDP2 or DDP"),
        (TAUGHT | {"context_parallel_size": 2}, "after the sequence is cut"),
        (TAUGHT | {"use_eaft": True}, "a loss of its own"),
        (TAUGHT | {"label_smoothing_factor": 0.1}, "a loss on labels"),
        (TAUGHT | {"reward_model": True}, "trains a score"),
        (TAUGHT | {"processor_type": "AutoProcessor"}, "more than text"),
        ({"use_onebitllms": True, "kd_trainer": True}, "Use `bitnet.teacher: base`"),
        ({"use_onebitllms": True, "bitnet": {"teacher_weight": 0.5}}, "there is no teacher"),
        (STRETCHED | {"deepspeed": {"zero_optimization": {"stage": 2}}}, "masters of the weights"),
        (STRETCHED | {"reinit_weights": True}, "nothing to keep"),
        (STRETCHED | {"rl": "kto"}, "reference model would not be stretched"),
    ],
)
def test_what_would_pass_them_by_is_refused(keys: dict[str, Any], words: str) -> None:
    assert any(words in sentence for sentence in refusals(keys)), refusals(keys)


@pytest.mark.parametrize("options, key", [({"teacher": "base"}, "teacher"), ({"start": "stretch"}, "start")])
def test_fsdp1_is_refused_and_fsdp2_is_not(options: dict[str, Any], key: str) -> None:
    keys: dict[str, Any] = {"bitnet": options, "fsdp_config": {"reshard_after_forward": True}}
    assert any(f"`bitnet.{key}" in sentence for sentence in fsdp_refusals(keys | {"fsdp_version": 1}))
    assert not fsdp_refusals(keys | {"fsdp_version": 2}) and not refusals({"use_onebitllms": True, **keys})
