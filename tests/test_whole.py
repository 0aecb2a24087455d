"""Whole checkpoints pass; whatever was cut short, lost or written over does not."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from axolotl_bitnet.run_folder import STATE
from axolotl_bitnet.storage.safetensors_stream import INDEX, SINGLE
from axolotl_bitnet.storage.trainer_checkpoint import checkpoints, forget, problems

Make = Callable[[Path], Path]


def save_weights(model: nn.Module, folder: Path, **options: object) -> None:
    model.save_pretrained(folder, **options)  # type: ignore[operator]


def save_states(folder: Path, optimizer: str = "optimizer.pt", ranks: int = 1) -> None:
    """What the Trainer writes after the weights, in its order."""
    states = {"state": {0: {"exp_avg": torch.randn(300)}}}
    torch.save(states, folder / optimizer)
    torch.save({"_step_count": 5}, folder / "scheduler.pt")
    for rank in range(ranks):
        name = f"rng_state_{rank}.pth" if ranks > 1 else "rng_state.pth"
        torch.save({"cpu": torch.random.get_rng_state()}, folder / name)
    (folder / STATE).write_text(json.dumps({"global_step": 4, "log_history": [{"loss": 1.5}] * 9}))


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., nn.Module]) -> nn.Module:
    return tiny_model("Llama", num_hidden_layers=1)


def one_process(model: nn.Module, folder: Path) -> None:
    save_weights(model, folder)
    save_states(folder)


def shards(model: nn.Module, folder: Path) -> None:
    save_weights(model, folder, max_shard_size="40KB")
    save_states(folder)
    (folder / "tokens_state.json").write_text('{"total": 7}')
    torch.save({"scale": 1.0}, folder / "scaler.pt")


def two_ranks(model: nn.Module, folder: Path) -> None:
    save_weights(model, folder)
    save_states(folder, ranks=2)


def fsdp_full(model: nn.Module, folder: Path) -> None:
    save_weights(model, folder)
    torch.save(model.state_dict(), folder / "pytorch_model_fsdp.bin")
    save_states(folder, optimizer="optimizer.bin", ranks=2)


def fsdp_sharded(model: nn.Module, folder: Path) -> None:
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        writer = dcp.FileSystemWriter(folder / name)
        dcp.save({"model": {"w": torch.randn(64)}}, storage_writer=writer, no_dist=True)
    save_states(folder, ranks=2)
    (folder / "optimizer.pt").unlink()


def deepspeed(model: nn.Module, folder: Path) -> None:
    save_weights(model, folder)
    (folder / "global_step4").mkdir()
    torch.save({"step": 4}, folder / "global_step4" / "mp_rank_00_model_states.pt")
    torch.save({"step": 4}, folder / "global_step4" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text("global_step4")
    save_states(folder)
    (folder / "optimizer.pt").unlink()


LAYOUTS = [one_process, shards, two_ranks, fsdp_full, fsdp_sharded, deepspeed]
RANKS = {two_ranks: 2, fsdp_full: 2, fsdp_sharded: 2}
# A run can go on without them, or torch finds it out by itself, for the index of shards is pickled.
IDLE = {"generation_config.json", "__0_0.distcp"}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_checkpoint_is_whole_until_any_of_its_files_is_gone_or_cut(
    layout: Callable[[nn.Module, Path], None], model: nn.Module, tmp_path: Path
) -> None:
    made = tmp_path / "checkpoint-4"
    made.mkdir()
    layout(model, made)
    ranks = RANKS.get(layout)
    assert problems(made) == problems(made, ranks) == []

    dice = random.Random(7)
    for path in sorted(path for path in made.rglob("*") if path.is_file()):
        if path.name in IDLE:
            continue
        content, where = path.read_bytes(), path.relative_to(made)
        may_lack = {"config.json", "tokens_state.json", "scaler.pt"} | (
            {SINGLE} if layout is fsdp_full else set()
        )
        may_lack |= {"mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"}  # one of them
        if layout is deepspeed:
            may_lack |= {"scheduler.pt"}
        path.unlink()
        found = problems(made, ranks)
        assert bool(found) == (path.name not in may_lack), (where, found)
        if path.name != ".metadata":
            for length in (0, 1, len(content) - 1, *(dice.randrange(len(content)) for _ in range(8))):
                path.write_bytes(content[:length])
                cut_json_still_whole = (
                    path.suffix == ".json" and length == len(content) - 1 and content[-1:] == b"\n"
                )
                found = problems(made, ranks)
                assert bool(found) != cut_json_still_whole, (where, length, len(content))
                assert len(found) <= 2 and all(len(line) > 10 for line in found)
        path.write_bytes(content)
    assert problems(made, ranks) == []


def test_problems_name_the_file(model: nn.Module, tmp_path: Path) -> None:
    one_process(model, tmp_path)
    (tmp_path / STATE).unlink()
    (tmp_path / "scheduler.pt").write_bytes(b"PK")
    found = problems(tmp_path)
    assert found[0] == f"{STATE} is missing: it is written last, so the save was interrupted"
    assert found[1].startswith("scheduler.pt is cut short or damaged") and len(found) == 2
    assert problems(tmp_path / "none") == ["there is no such folder"]
    (tmp_path / STATE).write_text("[]")
    assert "holds no JSON object" in problems(tmp_path)[0]
    (tmp_path / STATE).write_text("{}")
    assert problems(tmp_path)[0] == f"{STATE} has no global_step"


def test_random_states_of_every_rank(model: nn.Module, tmp_path: Path) -> None:
    """A rank may still be writing its own when the first one has written trainer_state.json."""
    two_ranks(model, tmp_path)
    assert problems(tmp_path, 3) == ["rng_state_2.pth is missing"]
    (tmp_path / "rng_state_0.pth").unlink()
    assert problems(tmp_path, 2) == ["rng_state_0.pth is missing"]


def test_deepspeeds_pointer_never_leaves_the_folder(model: nn.Module, tmp_path: Path) -> None:
    made = tmp_path / "checkpoint-4"
    made.mkdir()
    deepspeed(model, made)
    shutil.move(made / "global_step4", tmp_path / "elsewhere")
    (made / "latest").write_text("../elsewhere")
    assert problems(made) == ["latest names '../elsewhere', which holds no states"]


def test_a_distributed_save_that_did_not_finish(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dcp.FileSystemWriter, "finish", killed)
    with pytest.raises(BaseException):  # noqa: B017 (torch wraps it)
        fsdp_sharded(model, tmp_path)
    save_states(tmp_path)
    (tmp_path / "optimizer_0").mkdir()
    assert list((tmp_path / "pytorch_model_fsdp_0").glob("*.distcp"))
    found = problems(tmp_path)
    assert found[0].startswith("pytorch_model_fsdp_0/.metadata is missing") and len(found) == 3


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_forgotten_checkpoints_are_not_whole_in_any_part(
    layout: Callable[[nn.Module, Path], None], model: nn.Module, tmp_path: Path
) -> None:
    layout(model, tmp_path)
    had_index = (tmp_path / INDEX).exists()
    forget(tmp_path)
    assert not (tmp_path / STATE).exists() and not (tmp_path / INDEX).exists()
    found = problems(tmp_path)
    assert found[0].startswith(STATE)
    assert len(found) == 1 + had_index + 2 * (layout is fsdp_sharded)
    forget(tmp_path / "none")  # nothing there, nothing to do


def test_checkpoints_by_step(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "checkpoint-9-old", "my-checkpoint-11"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-9"]
    assert checkpoints(tmp_path / "none") == []
