"""What the monitor counts, against plain counts over whole matrices; when it warns; what a resume keeps."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from axolotl_bitnet import ops
from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.run_folder import MONITOR_FILE
from axolotl_bitnet.training.log import LOG
from axolotl_bitnet.training.monitor import sampling as sample
from axolotl_bitnet.training.monitor.callback import Monitor
from axolotl_bitnet.training.monitor.figures import Observation, observe, unmoved_above
from axolotl_bitnet.training.monitor.sampling import Unwatchable
from axolotl_bitnet.training.trainer_log import log_through

Model = Callable[..., nn.Module]


def model_of(**shapes: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: BitLinear(i, o, bias=False) for name, (o, i) in shapes.items()})


def codes_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: ops.ternarize.plain(module.weight.detach())[0]
        for name, module in model.named_modules()
        if isinstance(module, BitLinear)
    }


def jolt(model: nn.Module, size: float) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight += size * torch.randn_like(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_models_are_counted_exactly(tiny_model: Model, dtype: torch.dtype) -> None:
    model = tiny_model("Llama").to(dtype)
    names = convert_to_bitlinear(model)
    seen, steps = observe(model), [codes_of(model)]
    start_scales = {name: view.scale for name, view in seen.layers.items()}
    assert list(seen.layers) == names
    for size in (0.004, 0.02, 0.01):
        jolt(model, size)
        seen = observe(model, seen)
        steps.append(codes_of(model))
    everything = flips = swings = 0
    for name, view in seen.layers.items():
        start, earlier, before, now = (codes[name] for codes in (steps[0], *steps[-3:]))
        assert view.size == now.numel()
        assert view.zeros == (now == 0).double().mean()
        assert view.flips == (now != before).double().mean() > 0
        assert view.flips_total == (now != start).double().mean() > view.flips
        back = (now != before) & (before != earlier) & (now == earlier)
        assert view.oscillation == back.double().mean() > 0
        weight = model.get_submodule(name).weight.detach()
        assert view.scale == ops.ternarize.plain(weight)[2] and view.scale_start == start_scales[name]
        assert view.scale_drift == view.scale / view.scale_start - 1 != 0
        everything, flips, swings = (
            everything + now.numel(),
            flips + view.flips * now.numel(),
            swings + back.sum(),
        )
    metrics = seen.metrics()
    assert metrics["bitnet/flips"] == pytest.approx(float(flips / everything), rel=1e-3)
    assert metrics["bitnet/oscillation"] == pytest.approx(float(swings / flips), rel=1e-3)
    assert "bitnet/frozen" not in metrics
    drifts = [view.scale_drift for name, view in seen.layers.items() if name.endswith("q_proj")]
    assert metrics["bitnet/scale_drift/q_proj"] == pytest.approx(sum(drifts) / len(drifts), rel=1e-3)
    assert {key.rsplit("/", 1)[-1] for key in metrics if key.count("/") == 2} == set(seen.kinds)


def test_looking_changes_nothing(tiny_model: Model) -> None:
    model = tiny_model("Llama")
    convert_to_bitlinear(model)
    versions = [(p._version, p.requires_grad, p.detach().clone()) for p in model.parameters()]
    first = observe(model)
    second = observe(model, first)
    assert second.share("flips") == second.share("flips_total") == second.scale_drift() == 0
    for (version, needs, value), parameter in zip(versions, model.parameters(), strict=True):
        assert (version, needs) == (parameter._version, parameter.requires_grad)
        assert torch.equal(value, parameter)


def test_of_larger_models_a_sample_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "ELEMENTS", 3 * 5000)
    model = model_of(wide=(96, 640), tall=(640, 96), small=(40, 24))
    seen, before = observe(model), codes_of(model)
    assert sum(codes.numel() for codes in seen.codes) <= 15000
    jolt(model, 0.01)
    seen = observe(model, seen)
    for name, now in codes_of(model).items():
        view, error = seen.layers[name], 4 * math.sqrt(0.25 / 4000)
        assert view.zeros == pytest.approx((now == 0).double().mean().item(), abs=error)
        assert view.flips == pytest.approx((now != before[name]).double().mean().item(), abs=error)
        g = ops.ternarize.plain(model[name].weight.detach())[2]
        assert view.scale == pytest.approx(float(g), rel=0.05)
    assert seen.layers["small"].zeros == (codes_of(model)["small"] == 0).double().mean()


def test_a_sample_visits_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "ELEMENTS", 2048)
    model = model_of(only=(256, 64))
    model["only"].weight.data = torch.arange(64.0).repeat(256, 1)
    (piece,) = sample.pieces_of(model, dict(only=model["only"]))
    assert piece.elements.unique().numel() == 64 and 1000 < piece.elements.numel() <= 2048


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [1e-6, 1e-5, 3.3e-4])
def test_frozen_are_those_that_an_update_leaves_as_they_are(dtype: torch.dtype, rate: float) -> None:
    layer = BitLinear(64, 48, bias=False, dtype=dtype)
    layer.weight.data = torch.randn(48, 64).mul(torch.logspace(-4, 4, 64)).to(dtype)
    moved = (layer.weight.data.abs() + rate) != layer.weight.data.abs()
    seen = observe(layer, None, rate)
    assert seen.share("frozen") == pytest.approx(float((~moved).double().mean()), abs=0.01)
    assert observe(layer, None, lambda weight: rate).share("frozen") == seen.share("frozen")
    assert observe(layer, None, rate, torch.float32).share("frozen") <= seen.share("frozen")
    assert observe(layer, None, 0.0).share("frozen") == 1


def test_a_rate_of_1e_5_hardly_moves_bfloat16() -> None:
    assert unmoved_above(torch.bfloat16, 1e-5) == 2**-8
    assert unmoved_above(torch.float32, 1e-5) == 2**8


def test_nothing_to_look_at_is_said() -> None:
    with pytest.raises(ValueError, match="no BitLinear layer"):
        observe(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="other layers"):
        observe(model_of(a=(8, 8)), observe(model_of(a=(8, 4))))
    partitioned = model_of(a=(8, 8))
    partitioned["a"].weight.ds_id = 1
    with pytest.raises(Unwatchable, match="ZeRO-3"):
        observe(partitioned)


# The callback


class Loop:
    """The Trainer's part of it: a log, a state and callbacks."""

    def __init__(
        self, folder: Path, model: nn.Module, watcher: Monitor, optimizer: Any, step: int = 0
    ) -> None:
        self.args = SimpleNamespace(output_dir=str(folder), learning_rate=optimizer.param_groups[0]["lr"])
        self.state = SimpleNamespace(global_step=step)
        self.control = SimpleNamespace(should_log=True)
        self.model, self.watcher, self.optimizer = model, watcher, optimizer
        self.history: list[dict[str, float]] = []
        log_through(self, watcher)
        self.call("on_train_begin")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.history.append(logs)

    def call(self, event: str) -> None:
        keys = {"model": self.model, "optimizer": self.optimizer}
        getattr(self.watcher, event)(self.args, self.state, self.control, **keys)

    def step(self, change: Callable[[], None], next_rate: Any = None) -> dict[str, float]:
        self.call("on_pre_optimizer_step")
        change()
        if next_rate is not None:  # the Trainer steps its schedule before it logs the step
            self.optimizer.param_groups[0]["lr"] = next_rate
        self.state.global_step += 1
        self.call("on_step_end")
        self.log({"loss": 1.0})
        return self.history[-1]

    def save(self) -> Path:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        folder.mkdir()
        self.call("on_save")
        return folder


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[logging.LogRecord]]:
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    monkeypatch.setattr(LOG, "handlers", [Keep()])
    before = LOG.level
    LOG.setLevel(logging.INFO)
    yield records
    LOG.setLevel(before)


def warnings(said: list[logging.LogRecord]) -> list[str]:
    return [record.getMessage() for record in said if record.levelno == logging.WARNING]


def adamw(model: nn.Module, rate: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate)


def test_it_logs_with_the_loss_and_only_fresh_figures(tmp_path: Path) -> None:
    model = model_of(q_proj=(24, 16), up_proj=(40, 24))
    loop = Loop(tmp_path, model, Monitor(), adamw(model))
    entry = loop.step(lambda: jolt(model, 0.02))
    assert entry["loss"] == 1 and 0 < entry["bitnet/flips"] == entry["bitnet/flips_total"] < 1
    assert set(entry) == {
        "loss",
        "bitnet/flips",
        "bitnet/flips_total",
        "bitnet/zeros",
        "bitnet/oscillation",
        "bitnet/frozen",
        "bitnet/scale_drift",
        "bitnet/scale_drift/q_proj",
        "bitnet/scale_drift/up_proj",
    }
    assert all(type(value) is float for value in entry.values())
    loop.log({"loss": 2.0})
    loop.log({"eval_loss": 2.0})
    assert loop.history[1:] == [{"loss": 2.0}, {"eval_loss": 2.0}]
    loop.control.should_log = False
    loop.step(lambda: None)
    loop.control.should_log = True
    assert "bitnet/flips" not in loop.history[-1]


def test_monitor_json_says_where_every_layer_began_and_is(tmp_path: Path) -> None:
    model = model_of(q_proj=(24, 16), up_proj=(40, 24))
    loop = Loop(tmp_path, model, Monitor(), adamw(model))
    begun = json.loads((tmp_path / MONITOR_FILE).read_text())
    assert begun["step"] == 0 and begun["layers"]["q_proj"]["flips_total"] == 0
    loop.step(lambda: jolt(model, 0.02))
    jolt(model, 0.02)
    loop.call("on_train_end")
    ended = json.loads((tmp_path / MONITOR_FILE).read_text())
    assert ended["step"] == 1 and list(ended["layers"]) == ["q_proj", "up_proj"]
    for name, entry in ended["layers"].items():
        codes, _, g = ops.ternarize.plain(model[name].weight.detach())
        assert entry["zeros"] == pytest.approx((codes == 0).double().mean().item(), rel=1e-5)
        assert entry["scale"] == pytest.approx(float(g), rel=1e-5) and entry["flips_total"] > 0
        assert entry["scale_start"] == begun["layers"][name]["scale"]
    model["q_proj"].weight.data[0, 0] = math.nan
    loop.call("on_train_end")
    assert json.loads((tmp_path / MONITOR_FILE).read_text())["layers"]["q_proj"]["scale"] is None


def test_flips_since_the_start_survive_a_resume(tmp_path: Path, said: list[logging.LogRecord]) -> None:
    model = model_of(q_proj=(23, 17), up_proj=(41, 9))
    loop = Loop(tmp_path, model, Monitor(), adamw(model))
    loop.step(lambda: jolt(model, 0.02))
    checkpoint = loop.save()
    expected = loop.step(lambda: jolt(model, 0.0))
    other = Loop(tmp_path, model, Monitor(checkpoint), adamw(model), step=1)
    other.step(lambda: None)
    assert other.history[-1] == expected and expected["bitnet/flips_total"] > 0
    assert not any("counted from here" in record.getMessage() for record in said)

    (file,) = checkpoint.iterdir()
    damaged = file.read_bytes()[:-5]
    for content in (None, damaged, b""):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        fresh = Loop(tmp_path, model, Monitor(checkpoint), adamw(model), step=1)
        assert "counted from here" in said[-2].getMessage() or "counted from here" in said[-1].getMessage()
        assert fresh.step(lambda: None)["bitnet/flips_total"] == 0


def test_start_codes_of_other_layers_are_not_taken(tmp_path: Path, said: list[logging.LogRecord]) -> None:
    model, other = model_of(a=(24, 16)), model_of(b=(24, 16))
    checkpoint = Loop(tmp_path, model, Monitor(), adamw(model)).save()
    Loop(tmp_path, other, Monitor(checkpoint), adamw(other))
    assert any("counted from here" in record.getMessage() for record in said)


def test_it_says_before_training_what_can_move(tmp_path: Path, said: list[logging.LogRecord]) -> None:
    for dtype, level in ((torch.float32, logging.INFO), (torch.bfloat16, logging.WARNING)):
        said.clear()
        model = model_of(a=(64, 64)).to(dtype)
        Loop(tmp_path, model, Monitor(), adamw(model, 1e-5))
        (record,) = said
        assert record.levelno == level and "1e-05" in record.getMessage()
        assert ("100.0%" in record.getMessage()) == (dtype is torch.float32)
    model = model_of(a=(64, 64))
    said.clear()
    Loop(tmp_path, model, Monitor(), torch.optim.SGD(model.parameters(), lr=1e-5))
    assert not said  # its updates are not about as large as the rate


def test_rates_are_those_of_the_layers_groups(tmp_path: Path) -> None:
    model = model_of(a=(64, 64), b=(64, 64)).to(torch.bfloat16)
    groups = [{"params": [model["a"].weight], "lr": 10.0}, {"params": [model["b"].weight], "lr": 1e-30}]
    loop = Loop(tmp_path, model, Monitor(), torch.optim.AdamW(groups))
    assert loop.step(lambda: None)["bitnet/frozen"] == 0.5
    loop = Loop(tmp_path, model, Monitor(precision=torch.float64), torch.optim.AdamW(groups))
    assert loop.step(lambda: None)["bitnet/frozen"] == 0.5


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_frozen_is_of_the_step_that_is_logged(tmp_path: Path, kind: Any) -> None:
    """A schedule's rate after the last step is 0, at which nothing could move."""
    model = model_of(a=(64, 64)).to(torch.bfloat16)
    optimizer = adamw(model)
    optimizer.param_groups[0]["lr"] = kind(10.0)
    loop = Loop(tmp_path, model, Monitor(), optimizer)
    assert loop.step(lambda: None, kind(1e-30))["bitnet/frozen"] == 0
    assert loop.step(lambda: None, kind(10.0))["bitnet/frozen"] == 1
    assert loop.step(lambda: None, kind(0.0))["bitnet/frozen"] == 0
    loop.call("on_train_end")
    assert loop.watcher.seen is not None and loop.watcher.seen.share("frozen") == 0


def test_what_was_zero_from_the_start_is_not_counted(tmp_path: Path, said: list[logging.LogRecord]) -> None:
    """Such a matrix tells nothing of training, and no rate mends it."""
    model = model_of(q_proj=(64, 64), k_proj=(64, 64))
    other = model_of(q_proj=(64, 64))
    other["q_proj"].weight.data.copy_(model["q_proj"].weight.data)
    model["k_proj"].weight.data.zero_()
    entries = []
    for one in (model, other):
        loop = Loop(tmp_path, one, Monitor(), adamw(one))

        def double(one: nn.Module = one) -> None:
            one["q_proj"].weight.data[::2] *= 2  # type: ignore[index]

        entries.append(loop.step(double))
    with_zeros, alone = entries
    assert with_zeros.pop("bitnet/scale_drift/k_proj") == 0
    assert with_zeros == alone and not warnings(said)
    model["q_proj"].weight.data.zero_()
    assert observe(model).share("zeros") == 1  # where all are zero, that is what there is to say


def test_it_warns_once_when_nothing_flips(tmp_path: Path, said: list[logging.LogRecord]) -> None:
    model = model_of(a=(64, 64))
    loop = Loop(tmp_path, model, Monitor(), adamw(model))
    for step in range(1, 15):
        loop.step(lambda: None)
        assert len(warnings(said)) == (step >= 10)
    assert "nothing is learned" in warnings(said)[0] and "after 10 steps 0 of" in warnings(said)[0]


def test_it_warns_once_when_everything_swings(tmp_path: Path, said: list[logging.LogRecord]) -> None:
    model = model_of(a=(64, 64))
    loop = Loop(tmp_path, model, Monitor(), adamw(model))
    entries = [loop.step(lambda: model["a"].weight.data.neg_()) for _ in range(4)]
    assert [entry["bitnet/oscillation"] for entry in entries] == [0, 1, 1, 1]
    (text,) = warnings(said)
    assert "back and forth" in text and "100%" in text
    said.clear()
    loop = Loop(tmp_path, model, Monitor(), adamw(model))
    for _ in range(4):
        loop.step(lambda: model["a"].weight.data.copy_(torch.randn(64, 64)))
    assert not warnings(said)  # flips, but on and on to other codes: a third of them comes back by chance


def test_it_warns_of_layers_that_collapse_or_have_no_zeros(
    tmp_path: Path, said: list[logging.LogRecord]
) -> None:
    model = model_of(a=(64, 64), b=(64, 64), c=(64, 64))
    loop = Loop(tmp_path, model, Monitor(), adamw(model))
    assert not warnings(said)
    model["b"].weight.data.mul_(1e-3)[:, 0] = 1.0
    model["c"].weight.data.sign_()
    for _ in range(3):
        loop.step(lambda: None)
    collapse, binary = warnings(said)
    assert "1 of 3 ternary layers collapse" in collapse and "98.4% of the codes of b" in collapse
    assert "1 of 3 ternary layers" in binary and "0.0% of the codes of c" in binary


def test_it_is_off_where_it_cannot_look(tmp_path: Path, said: list[logging.LogRecord]) -> None:
    model = model_of(a=(8, 8))
    model["a"].weight.ds_id = 1
    loop = Loop(tmp_path, model, Monitor(), adamw(model))
    (record,) = said
    assert "monitor is off" in record.getMessage() and "ZeRO-3" in record.getMessage()
    assert loop.step(lambda: None) == {"loss": 1.0}
    loop.call("on_save")
    loop.call("on_train_end")
    assert not (tmp_path / MONITOR_FILE).exists()


def test_an_observation_shows_its_figures_not_its_codes() -> None:
    assert "tensor" not in repr(observe(model_of(a=(8, 8)))) and Observation.__doc__
