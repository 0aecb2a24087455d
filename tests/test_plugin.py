"""The plugin in real Axolotl runs on the CPU."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

pytest.importorskip("axolotl.cli")  # sets up logging, and would take away a handler that was there before

from packaging.version import Version
from transformers import AutoTokenizer

from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.model.fingerprint import Fingerprint, TensorFingerprint, fingerprint_model
from axolotl_bitnet.model.layer_plan import ConversionError
from axolotl_bitnet.plugin import plugin as plugin_module
from axolotl_bitnet.storage.safetensors_stream import INDEX
from axolotl_bitnet.training.log import LOG
from axolotl_bitnet.verify.verify import VerificationError, verify_checkpoint
from support import TINY
from support.processes import python
from support.runs import config, preference, train
from support.runs import main as one_run

MakeModel = Callable[..., torch.nn.Module]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: MakeModel) -> Path:
    """A tiny random Llama on disk, with the demo's tokenizer."""
    return _save(tiny_model("Llama", vocab_size=_vocabulary()), tmp_path_factory.mktemp("base"))


def _vocabulary() -> int:
    return -(-len(AutoTokenizer.from_pretrained(TINY / "model")) // 32) * 32


def _save(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "model").save_pretrained(folder)
    return folder


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bitnet.json").read_text())


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class _NoOnebitllms:
    """An import hook that fails where onebitllms is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "onebitllms":
            raise AssertionError("onebitllms was imported")


def test_a_run_learns_packs_and_verifies(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [_NoOnebitllms(), *sys.meta_path])
    log = _Log()
    monkeypatch.setattr(LOG, "handlers", [log])
    monkeypatch.setattr(LOG, "level", logging.INFO)
    run = train(config(tmp_path, base, max_steps=8, bitnet={"learning_rate_multiplier": 3}))
    out = tmp_path / "out"

    assert run.losses[-1] < run.losses[0]
    assert run.trainer.args.learning_rate == pytest.approx(3e-3)
    layers = [name for name, module in run.model.named_modules() if isinstance(module, BitLinear)]
    assert len(layers) == 14 and not isinstance(run.model.lm_head, BitLinear)
    assert run.cfg.use_onebitllms is True  # hidden from Axolotl's core only while it loads

    said = "\n".join(log.lines)
    assert said.count("base 0.001 x multiplier 3 = effective 0.003 (all parameters)") == 1
    assert said.count("verified: 14 ternary layers") == 1

    record = _record(out)
    assert record["converted"] == layers and record["dense"] == ["lm_head"]
    assert record["artifacts"]["packed"]["verified"] is True
    assert Fingerprint.from_json(record["fingerprint"]) == fingerprint_model(run.model)
    assert verify_checkpoint(out / "packed", out).ok
    assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= {
        path.name for path in (out / "packed").iterdir()
    }


@pytest.mark.slow
@pytest.mark.skipif(
    Version(version("axolotl")) < Version("0.21"),
    reason="Axolotl finds plugins by their entry points since 0.21",
)
def test_the_flag_alone_is_enough(base: Path, tmp_path: Path) -> None:
    settings = config(tmp_path, base, plugins=None, max_steps=1)
    assert "plugins" not in settings
    (tmp_path / "config.json").write_text(json.dumps(settings))
    python("-m", "support.runs", tmp_path / "config.json", tmp_path / "result.json")
    assert "onebitllms" not in json.loads((tmp_path / "result.json").read_text())["modules"]
    assert verify_checkpoint(tmp_path / "out" / "packed", tmp_path / "out").ok


@pytest.mark.slow
def test_latents_are_float32_unless_asked_otherwise(base: Path, tmp_path: Path) -> None:
    model = train(config(tmp_path, base, max_steps=1)).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118


@pytest.mark.slow
def test_dense_runs_are_untouched_by_the_installed_plugin(base: Path, tmp_path: Path) -> None:
    results = []
    for hidden in (True, False):
        folder = tmp_path / f"hidden-{hidden}"
        folder.mkdir()
        settings = config(
            folder, base, use_onebitllms=None, plugins=None if hidden else config(folder, base)["plugins"]
        )
        (folder / "config.json").write_text(json.dumps(settings))
        files = [folder / "config.json", folder / "result.json"]
        if hidden:
            python("-m", "support.runs", *files, "--hide", OMP_NUM_THREADS="1")
        else:
            one_run(*map(str, files))  # in this process, after ternary runs
        results.append(json.loads((folder / "result.json").read_text()))
        assert not (folder / "out" / "bitnet.json").exists()
    without, installed = results
    assert without["modules"] == [] and "axolotl_bitnet.plugin.plugin" in installed["modules"]
    assert installed["losses"] == without["losses"] and len(without["losses"]) == 3
    assert installed["weights"] == without["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("make", [config, preference])
def test_scope_ternary_multiplies_the_rate_of_bitlinear_weights_only(
    make: Callable[..., dict[str, Any]], base: Path, tmp_path: Path
) -> None:
    block = {"learning_rate_multiplier": 5, "learning_rate_scope": "ternary", "export": []}
    run = train(make(tmp_path, base, max_steps=1, bitnet=block))
    rates = {
        id(parameter): group["lr"]
        for group in run.trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    ternary = {id(module.weight) for module in run.trainer.model.modules() if isinstance(module, BitLinear)}
    assert len(ternary) == 14
    for parameter in run.trainer.model.parameters():
        assert rates[id(parameter)] == pytest.approx(5e-3 if id(parameter) in ternary else 1e-3)
    assert not (tmp_path / "out" / "packed").exists()


@pytest.mark.slow
def test_a_previous_runs_files_are_replaced_never_packed(base: Path, tmp_path: Path) -> None:
    train(config(tmp_path, base, max_steps=1))
    out = tmp_path / "out"
    first = _record(out)["fingerprint"]["digest"]
    (out / INDEX).write_text(
        '{"weight_map": {"x": "model-00001-of-00002.safetensors"}}'
    )  # an older, sharded save
    (out / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    train(config(tmp_path, base, max_steps=2))
    assert _record(out)["fingerprint"]["digest"] != first
    assert verify_checkpoint(out / "packed", out).ok
    assert not (out / "_previous").exists() and not (out / INDEX).exists()


@pytest.mark.slow
def test_a_packed_model_that_is_not_the_trained_one_fails_loudly_and_keeps_the_latents(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_code_off(model: torch.nn.Module) -> Fingerprint:
        tensors = dict(fingerprint_model(model).tensors)
        name = sorted(tensors)[3]
        entry = tensors[name]
        other = f"{(int(entry.codes, 16) + 1) % 2**64:016x}"
        tensors[name] = TensorFingerprint(entry.shape, other, entry.scale, entry.zeros)
        return Fingerprint(tensors)

    monkeypatch.setattr(plugin_module, "fingerprint_model", one_code_off)
    with pytest.raises(VerificationError, match="codes differ"):
        train(config(tmp_path, base, max_steps=1))
    out = tmp_path / "out"
    assert (out / "model.safetensors").exists() and not (out / "packed").exists()
    assert _record(out)["artifacts"]["packed"]["verified"] is False


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"quantization_config": {"quant_method": "bitnet", "linear_class": "bitlinear"}},
            "quantized already",
        ),
        ({"intermediate_size": 130}, "up_proj has out_features = 130"),
        ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "experts .* fuses its experts"),
    ],
)
def test_a_base_that_cannot_work_is_refused_before_its_weights_are_read(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    broken = tmp_path / "base"
    broken.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":  # there are no weights to read
            (broken / path.name).write_bytes(path.read_bytes())
    settings = json.loads((broken / "config.json").read_text()) | changes
    (broken / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConversionError, match=message):
        train(config(tmp_path, broken))


@pytest.mark.slow
def test_torch_compile_trains_as_eager_does(base: Path, tmp_path: Path) -> None:
    """The same data and seed: only what the compiler fuses around our operations may round otherwise."""
    from accelerate.utils import is_compiled_module

    losses = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        folder.mkdir()
        run = train(config(folder, base, torch_compile=compiled or None, max_steps=4))
        losses.append(run.losses)
        layers = run.trainer.model.base_model.layers
        assert ["forward" in vars(layer) for layer in layers] == [compiled] * len(layers)
        assert not is_compiled_module(run.trainer.model_wrapped)  # not once more, as a whole
        torch.compiler.reset()
    assert len(losses[0]) == 4 and losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.slow
def test_the_whole_step_reads_each_weight_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches with checkpointing are four readings; the callback makes it one. Losses stay."""
    from axolotl_bitnet import ops

    made = 0
    original = ops.ternarize

    def counting(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        nonlocal made
        made += 1
        return original(weight)

    settings = dict(
        gradient_accumulation_steps=2, gradient_checkpointing=True, max_steps=2, bitnet={"export": []}
    )
    losses = []
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr(plugin_module.BitNetPlugin, "add_callbacks_post_trainer", lambda *_: [])
        made = 0
        with monkeypatch.context() as patch:
            patch.setattr(ops, "ternarize", counting)
            folder = tmp_path / str(kept)
            folder.mkdir()
            losses.append(train(config(folder, base, **settings)).losses)
        assert made == 14 * 2 * (1 if kept else 4)
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_layers_are_fused_unless_told_otherwise(base: Path, tmp_path: Path) -> None:
    losses = []
    for fuse in (True, False):
        folder = tmp_path / str(fuse)
        folder.mkdir()
        run = train(config(folder, base, bitnet={"fuse": fuse}))
        names = {type(module).__name__ for module in run.model.modules()}
        assert ("SwiGLU" in names, "LlamaMLP" in names) == (fuse, not fuse)
        losses.append(run.losses)
    # The codes are equal; a last bit of the rest may not be.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "block, expected", [({"int8_grad": True}, "int8_dx"), ({"backward": "int8"}, "int8")]
)
def test_an_eight_bit_backward_reaches_the_layers_and_trains(
    base: Path, tmp_path: Path, block: dict[str, Any], expected: str
) -> None:
    run = train(config(tmp_path, base, max_steps=8, bitnet=block))
    layers = [module for module in run.model.modules() if isinstance(module, BitLinear)]
    assert layers and all(layer.backward == expected for layer in layers)
    assert run.losses[-1] < run.losses[0]


def callbacks_under(version: int, **options: str) -> list[Any]:
    from types import SimpleNamespace

    from axolotl_bitnet.plugin.callbacks import gathering

    return gathering(
        SimpleNamespace(fsdp_version=version, rl=options.pop("rl", None)),
        SimpleNamespace(accelerator=SimpleNamespace(prepare=None)),
        options.get("gather", "auto"),
    )


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the plugin logs."""
    lines: list[str] = []
    monkeypatch.setattr("axolotl_bitnet.plugin.callbacks.info", lambda line, *args: lines.append(line % args))
    return lines


def test_fsdp2_gathers_codes_unless_told_otherwise(said: list[str]) -> None:
    for wish in ({}, {"gather": "auto"}, {"gather": "ternary"}):
        (callback,) = callbacks_under(2, **wish)
        assert type(callback).__name__ == "GatherTernary" and "2-bit codes" in said.pop()
        assert callback.required == (wish.get("gather") == "ternary") and callback.keep
    assert not callbacks_under(2, rl="grpo")[0].keep and said.pop()
    assert callbacks_under(2, gather="native") == [] and "bitnet.gather: native" in said.pop()
    assert callbacks_under(1) == [] and not said


def test_a_torch_without_a_place_for_codes_gathers_weights(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "axolotl_bitnet.training.gather_callback", None)
    assert callbacks_under(2) == [] and "has no place for codes" in said.pop()
    with pytest.raises(RuntimeError, match=r"gather: ternary.* does not fit torch"):
        callbacks_under(2, gather="ternary")


def test_a_dense_config_on_ternary_latents_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl.utils.dict import DictDefault

    warnings: list[str] = []
    monkeypatch.setattr(plugin_module, "warn", warnings.append)

    def load(base: str) -> list[str]:
        warnings.clear()
        plugin_module.BitNetPlugin().pre_model_load(
            DictDefault(base_model=base, output_dir=str(tmp_path / "out"))
        )
        return warnings

    def write(**entries: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps(entries))
        return str(tmp_path)

    entry = {"definition": 1, "converted": ["layer"], "dense": []}
    (told,) = load(write(axolotl_bitnet=entry))
    assert str(tmp_path) in told and "use_onebitllms: true" in told
    assert load(write(axolotl_bitnet=entry, quantization_config={"quant_method": "bitnet"})) == []  # packed
    assert load(write(model_type="llama")) == []
    (tmp_path / "config.json").write_text("{")
    assert load(str(tmp_path)) == [] and load("nobody/nothing") == []
