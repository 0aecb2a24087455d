"""Names of torch, transformers, TRL, Triton and Axolotl that may be gone one day: each is taken away in turn,
and what follows is one sentence and the fallback, before the training begins."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from axolotl_bitnet import convert_to_bitlinear
from axolotl_bitnet.layers import bitlinear, fused_llama
from axolotl_bitnet.model import layer_plan
from axolotl_bitnet.training import rounding
from axolotl_bitnet.training.trainer_epoch import resume_epochs
from axolotl_bitnet.training.trainer_evaluation import log_ternary_loss
from axolotl_bitnet.training.trainer_log import log_through
from axolotl_bitnet.training.trainer_save import forget_before_saving

pytest.importorskip("axolotl")
pytest.importorskip("trl")


@pytest.fixture
def said() -> Any:
    """What is logged."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("axolotl.bitnet")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def trainer(folder: Path, **names: Any) -> Any:
    """A Trainer with these names only."""
    return SimpleNamespace(args=SimpleNamespace(output_dir=str(folder), should_save=True), **names)


def anew(name: str) -> Any:
    """A module of ours a second time, beside the one that is in use: it looks up others' names again."""
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The Trainer


def test_a_trainer_that_saves_otherwise(tmp_path: Path, said: list[str]) -> None:
    forget_before_saving(trainer(tmp_path))
    assert said == []  # no checkpoint is there that could be written over
    (tmp_path / "checkpoint-3").mkdir()
    forget_before_saving(trainer(tmp_path))
    assert "has no Trainer._save_checkpoint" in said.pop() and not said


def test_a_save_is_changed_only_where_checkpoints_are(tmp_path: Path) -> None:
    untouched = trainer(tmp_path, _save_checkpoint=len)
    forget_before_saving(untouched)
    assert untouched._save_checkpoint is len
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    state.parent.mkdir()
    state.write_text("{}")
    changed = trainer(tmp_path, _save_checkpoint=lambda: state.exists(), state=SimpleNamespace(global_step=3))
    forget_before_saving(changed)
    assert changed._save_checkpoint() is False


@pytest.mark.parametrize("run_epoch", [None, lambda model, epoch: None])
def test_a_trainer_that_runs_epochs_otherwise(tmp_path: Path, said: list[str], run_epoch: Any) -> None:
    without = trainer(tmp_path, **({} if run_epoch is None else {"_run_epoch": run_epoch}))
    resume_epochs(without)
    assert getattr(without, "_run_epoch", None) is run_epoch
    assert "has no Trainer._run_epoch as it is known here" in said.pop() and not said


def test_a_trainer_that_passes_on_what_it_does_not_read(tmp_path: Path, said: list[str]) -> None:
    """Axolotl 0.21's is one. Where nothing is left to train, no epoch runs."""
    ran: list[int] = []
    state, control = SimpleNamespace(global_step=3, max_steps=4), SimpleNamespace(should_training_stop=False)
    one = trainer(tmp_path, state=state, control=control)
    one._run_epoch = lambda epoch, **others: ran.append(epoch)
    resume_epochs(one)
    given = {"train_dataloader": [], "resume_from_checkpoint": "checkpoint-3"}
    one._run_epoch(epoch=1, **given)
    assert ran == [1] and not control.should_training_stop
    state.global_step = 4
    one._run_epoch(epoch=2, **given)
    assert ran == [1] and control.should_training_stop and not said


def test_a_trainer_whose_subclass_hides_what_is_gone(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.Trainer, "_run_epoch", lambda self, epoch: None)
    resume_epochs(trainer(tmp_path, _run_epoch=lambda epoch, **others: None))
    assert "has no Trainer._run_epoch as it is known here" in said.pop() and not said


def test_a_trainer_that_logs_otherwise(tmp_path: Path, said: list[str]) -> None:
    log_through(trainer(tmp_path), SimpleNamespace(logs=dict))
    assert "has no Trainer.log" in said.pop() and not said
    log_through(trainer(tmp_path))
    assert said == []  # nothing was to be logged


def test_a_trainer_that_evaluates_otherwise(tmp_path: Path, said: list[str]) -> None:
    log_ternary_loss(trainer(tmp_path))
    assert "has no Trainer.evaluation_loop" in said.pop() and not said


def test_the_trainer_of_this_version_has_them_all() -> None:
    transformers = pytest.importorskip("transformers")
    for name in ("_save_checkpoint", "_run_epoch", "log", "evaluation_loop"):
        assert callable(getattr(transformers.Trainer, name))
    arguments = inspect.signature(transformers.Trainer._run_epoch).parameters
    assert {"resume_from_checkpoint", "train_dataloader", "epoch"} <= arguments.keys()


def test_axolotls_trainer_is_resumed_without_a_warning(tmp_path: Path, said: list[str]) -> None:
    from axolotl.core.trainers.base import AxolotlTrainer

    resume_epochs(trainer(tmp_path, _run_epoch=AxolotlTrainer._run_epoch))
    assert not said


def test_a_run_without_the_class_that_marks_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Axolotl passes over a plugin whose import fails, and trains by its own path."""
    callbacks = pytest.importorskip("transformers.trainer_callback")
    monkeypatch.delattr(callbacks, "ExportableState")
    resume, state = anew("axolotl_bitnet.plugin.resume"), callbacks.TrainerState()
    run = resume.TernaryRun({"ranks": 1}, str(tmp_path))
    run.on_train_begin(SimpleNamespace(output_dir=str(tmp_path)), state, None)
    assert state.stateful_callbacks["TernaryRun"]["args"]["settings"] == {"ranks": 1}


# Loading and converting


def test_a_transformers_that_does_not_tell_the_names_it_saves(
    monkeypatch: pytest.MonkeyPatch, said: list[str], tiny_model: Callable[..., nn.Module]
) -> None:
    loading = pytest.importorskip("transformers.core_model_loading")
    monkeypatch.delattr(loading, "revert_weight_conversion")
    names = convert_to_bitlinear(tiny_model("Llama"))
    assert len(names) == 14
    assert "has no revert_weight_conversion" in said.pop() and not said


def test_a_torch_that_does_not_tell_of_global_hooks(
    monkeypatch: pytest.MonkeyPatch, said: list[str], tiny_model: Callable[..., nn.Module]
) -> None:
    monkeypatch.delattr(nn.modules.module, "_has_any_global_hook")
    assert anew("axolotl_bitnet.layers.bitlinear").has_any_global_hook is None
    for module in (bitlinear, fused_llama):
        monkeypatch.setattr(module, "has_any_global_hook", None)
    model = tiny_model("Llama")
    assert len(convert_to_bitlinear(model)) == 14
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"
    model(torch.arange(4)[None], labels=torch.arange(4)[None]).loss.backward()
    assert "has no _has_any_global_hook: MLPs and norms are not fused" in said.pop() and not said


@pytest.mark.slow
def test_a_torch_without_the_name_for_subclasses() -> None:
    """Only gathered weights need it; layers are converted and trained without."""
    code = (
        "import torch\n"
        "del torch._C._disabled_torch_function_impl\n"
        "from axolotl_bitnet import convert_to_bitlinear\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 4))\n"
        "assert convert_to_bitlinear(model) == ['0']\n"
        "model(torch.randn(2, 8)).sum().backward()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# Triton


def compiled(*missing: str, launcher: Any = None) -> Any:
    """A compiled kernel, less some names; called through Triton, it says so."""

    def run(
        gridX: int, gridY: int, gridZ: int, stream: int, function: Any, kernel_metadata: Any,
        launch_metadata: Any, launch_enter_hook: Any, launch_exit_hook: Any, *args: Any,
    ) -> Any:  # fmt: skip
        return "directly", (gridX, gridY, gridZ, stream, function, kernel_metadata), args

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args: ("by Triton", grid, args)

    kernel = Compiled()
    for name, value in {"run": launcher or run, "function": 7, "packed_metadata": 8}.items():
        if name not in missing:
            setattr(kernel, name, value)
    return kernel


def other_launcher(gridX: int, gridY: int, gridZ: int, stream: int, function: Any, *args: Any) -> Any:
    """Five names are the known ones, and what follows is not named; Triton 3.6 has this one."""
    return "directly", (gridX, gridY, gridZ, stream, function, args[0]), args[4:]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("axolotl_bitnet.ops.kernels.launch")
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 9))
    monkeypatch.setattr(module, "driver", driver)
    module._say_slower.cache_clear()
    return module


def test_a_known_launcher_is_called_directly(launch: Any, said: list[str]) -> None:
    assert launch._direct(compiled(), 5, 0)(1, 2) == ("directly", (5, 1, 1, 9, 7, 8), (1, 2))
    assert said == []


def test_the_launcher_of_triton_3_6(launch: Any, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.triton, "__version__", "3.6.0")
    kernel = compiled(launcher=other_launcher)
    assert launch._direct(kernel, 5, 0)(1, 2) == ("directly", (5, 1, 1, 9, 7, 8), (1, 2))
    assert said == []


@pytest.mark.parametrize("name", ["run", "function", "packed_metadata", "launcher", "driver"])
def test_a_triton_that_launches_otherwise(launch: Any, said: list[str], name: str) -> None:
    if name == "driver":
        launch.driver.active = object()
    kernel = compiled(name, launcher=other_launcher if name == "launcher" else None)
    for _ in range(2):
        assert launch._direct(kernel, 5, 0)(1, 2) == ("by Triton", (5, 1, 1), (1, 2))
    assert "launches kernels itself, which is slower" in said.pop() and not said


# TRL and Axolotl


def test_a_trl_that_keys_its_cache_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer import dpo_trainer

    from axolotl_bitnet.plugin.upstream.trl_reference_cache import key_precomputed_references

    monkeypatch.delattr(dpo_trainer, "hash_module")
    with pytest.raises(RuntimeError, match=r"precompute_ref_log_probs.*has no hash_module"):
        key_precomputed_references()
    monkeypatch.setitem(sys.modules, "trl.trainer", types.ModuleType("trl.trainer"))
    with pytest.raises(RuntimeError, match="has no hash_module"):
        key_precomputed_references()


@pytest.mark.parametrize(
    "gone", ["vllm_generation", "enable_sleep_mode", "sync_weights", "_push_param_to_vllm"]
)
def test_a_trl_that_pushes_weights_otherwise(gone: str) -> None:
    from axolotl_bitnet.plugin.upstream.trl_vllm import push_dense_ternary

    names = {"sync_weights": lambda self: None, "_push_param_to_vllm": lambda *args: None}
    names = {name: value for name, value in names.items() if name != gone}
    generation = type("VLLMGeneration", (), names)()
    if gone != "enable_sleep_mode":
        generation.enable_sleep_mode = False
    with pytest.raises(RuntimeError, match="pushes weights in a way that is not known here"):
        push_dense_ternary(None if gone == "vllm_generation" else generation, nn.Linear(2, 2))


@pytest.mark.parametrize("gone", ["accelerator", "callback_handler"])
def test_a_trainer_whose_reference_cannot_be_replaced(gone: str, tmp_path: Path) -> None:
    from axolotl_bitnet.plugin.upstream.trl_reference import settle_reference

    loaded = nn.Sequential(nn.Linear(8, 4))
    convert_to_bitlinear(loaded)
    names = {"accelerator": SimpleNamespace(prepare_model=None), "callback_handler": object()}
    names["accelerator"] = SimpleNamespace(prepare_model=lambda model, evaluation_mode: model)
    names.pop(gone)
    with pytest.raises(
        RuntimeError, match=r"reference model .* is dense .*It cannot be replaced: this trainer"
    ):
        settle_reference(trainer(tmp_path, ref_model=nn.Linear(2, 2), **names), loaded)


def test_an_axolotl_that_connects_processes_otherwise(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    import accelerate
    import axolotl.utils.distributed as distributed

    from axolotl_bitnet.plugin.upstream.fsdp2_offload import connect_for_offload

    connected: list[bool] = []
    monkeypatch.setattr(accelerate, "PartialState", lambda: connected.append(True))
    monkeypatch.delattr(distributed, "init_distributed_state")
    cfg = SimpleNamespace(fsdp_version=2, fsdp_config=SimpleNamespace(offload_params=True))
    connect_for_offload(cfg)
    assert connected == [True] and "has no init_distributed_state" in said.pop() and not said
    connect_for_offload(SimpleNamespace(fsdp_version=2, fsdp_config=None))
    assert connected == [True]  # where nothing is offloaded, it is not needed


@pytest.mark.parametrize("nodes", [1, 2])
def test_an_axolotl_without_local_rank(nodes: int, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    from axolotl_bitnet.plugin.upstream.save_once import save_once

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(4 // nodes))
    assert save_once(SimpleNamespace(local_rank=None, output_dir="out")) is False
    assert len(said) == nodes - 1 and all("has no local_rank" in line for line in said)


def test_the_first_process_of_another_node_does_not_save(monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl_bitnet.plugin.upstream.save_once import save_once

    monkeypatch.setenv("RANK", "2")
    cfg = SimpleNamespace(local_rank=0, output_dir="out")
    assert save_once(cfg) is True and cfg.local_rank == 2
    monkeypatch.setenv("RANK", "0")
    first = SimpleNamespace(local_rank=0, output_dir="out")
    assert save_once(first) is False and first.local_rank == 0


def test_an_axolotl_that_reads_configs_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    import axolotl.loaders.utils as utils

    from axolotl_bitnet.plugin.base_model import check_base

    monkeypatch.delattr(utils, "load_model_config")
    with pytest.raises(layer_plan.ConversionError, match=r"has no load_model_config.*is not supported"):
        check_base(SimpleNamespace(), [])


def test_an_axolotl_without_the_check_of_falcons() -> None:
    from axolotl_bitnet.plugin.upstream.falcon_fsdp import let_llama_falcons_shard

    merged = type("Config", (), {})
    let_llama_falcons_shard(merged)
    assert not hasattr(merged, "check_falcon_fsdp")


@pytest.mark.parametrize(
    "gone", ["get_optimizer_cls_and_kwargs", "disable_cache_limit", "_new_buffer", "single_param_adam"]
)
def test_rounding_that_does_not_fit(gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optim = pytest.importorskip("torchao.optim")
    import torch._dynamo.utils

    homes = {
        "disable_cache_limit": torch._dynamo.utils,
        "_new_buffer": next(kind for kind in optim.AdamW8bit.__mro__ if "_new_buffer" in vars(kind)),
        "single_param_adam": optim.adam,
    }
    names = {} if gone not in homes else {"get_optimizer_cls_and_kwargs": lambda: None}
    if gone in homes:
        monkeypatch.delattr(homes[gone], gone)
    rounding.seeded_adamw.cache_clear()
    with pytest.raises(rounding.RoundingError, match=rf"does not fit these versions .*{gone}"):
        rounding.seed_the_rounding(SimpleNamespace(**names))
    rounding.seeded_adamw.cache_clear()


def test_gather_falls_back_for_each_name_of_fsdp2() -> None:
    """In test_gather.py, for it takes several processes; here only that the cases are there."""
    from test_gather import CASES

    assert sum(name.startswith("falls back") for name in CASES) >= 4
    assert torch.distributed.is_available()
