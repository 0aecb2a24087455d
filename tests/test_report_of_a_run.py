from __future__ import annotations

import json
import logging
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from axolotl_bitnet.report import page as page_module
from axolotl_bitnet.report.record import HIDDEN
from support import TINY, reports
from support.reports import Page, loads

pytestmark = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "find_spec", lambda name: None if name == "matplotlib" else object())


def _command(folder: Path) -> Any:
    from axolotl_bitnet.cli.main import main

    return CliRunner().invoke(main, ["report", str(folder)])


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("axolotl")
    run = reports.whole(tmp_path / "run", layers=1)
    result = _command(run)
    assert result.exit_code == 0 and result.output.strip() == str(run / "report" / "index.html")
    assert (run / "report" / "index.html").is_file()
    (tmp_path / "empty").mkdir()
    result = _command(tmp_path / "empty")
    assert result.exit_code == 2 and "holds no run" in result.output


def test_the_command_without_matplotlib(tmp_path: Path, no_matplotlib: None) -> None:
    pytest.importorskip("axolotl")
    result = _command(reports.whole(tmp_path / "run", layers=1))
    assert result.exit_code == 2
    assert "a report needs matplotlib, which is not installed" in result.output
    assert "pip install 'axolotl-bitnet[report]'" in result.output and "Traceback" not in result.output


def test_a_report_never_fails_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, no_matplotlib: None
) -> None:
    pytest.importorskip("axolotl")
    from axolotl_bitnet.plugin import run_log

    caplog.set_level(logging.INFO, "axolotl.bitnet")
    monkeypatch.setattr(logging.getLogger("axolotl"), "propagate", True)
    run_log.report_run(reports.whole(tmp_path / "run", layers=1))
    assert "no report: a report needs matplotlib" in caplog.text

    def fail(folder: Path) -> Path:
        raise RuntimeError("something unforeseen")

    monkeypatch.setattr(run_log, "write_report", fail)
    run_log.report_run(tmp_path)
    assert "something unforeseen" in caplog.text


def test_a_log_that_cannot_be_written_never_fails_a_run(tmp_path: Path) -> None:
    pytest.importorskip("axolotl")
    from axolotl_bitnet.plugin.run_log import RunLog

    (tmp_path / "file").write_text("")
    arguments = SimpleNamespace(output_dir=str(tmp_path / "file"), world_size=1)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True, log_history=[{"a": object()}])
    callback = RunLog({})
    callback.on_train_begin(arguments, state, None)
    arguments.output_dir = str(tmp_path)
    callback.on_train_end(arguments, state, None)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    pytest.importorskip("axolotl")
    from axolotl_bitnet.plugin.run_log import RunLog

    state = SimpleNamespace(global_step=0, is_world_process_zero=False, log_history=[])
    RunLog({}).on_train_begin(SimpleNamespace(output_dir=str(tmp_path), world_size=2), state, None)
    assert not any(tmp_path.iterdir())


def test_a_run_whose_export_fails_has_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("axolotl")
    from axolotl.utils.dict import DictDefault

    from axolotl_bitnet import BitNetPlugin
    from axolotl_bitnet.model.fingerprint import Fingerprint

    plugin: Any = BitNetPlugin()
    plugin._trained = Fingerprint({})
    cfg = DictDefault({"use_onebitllms": True, "output_dir": str(tmp_path), "learning_rate": 1e-3})
    with pytest.raises(Exception, match=r"config\.json"):
        plugin.post_train(cfg, None)
    assert "Not verified" in Page(tmp_path / "report" / "index.html").text


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and the report that it wrote; then the same resumed from the middle, in another folder."""
    pytest.importorskip("axolotl")
    from support.runs import config, train

    folder = tmp_path_factory.mktemp("runs")
    settings = config(
        folder,
        TINY / "model",
        reinit_weights=True,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        val_set_size=0.05,
        eval_steps=2,
        bitnet={"learning_rate_multiplier": 2},
        hub_model_id=None,
        wandb_name="hf_abcdefghijklmnopqrstuvwxyz",
    )
    train(settings, report=True)
    shutil.copytree(folder / "out", folder / "resumed")
    for path in (folder / "resumed").glob("*.json"):
        path.unlink()
    shutil.rmtree(folder / "resumed" / "checkpoint-4")
    settings |= {"output_dir": str(folder / "resumed")}
    settings |= {"resume_from_checkpoint": str(folder / "resumed" / "checkpoint-2")}
    train(settings, report=True)
    return folder


@pytest.mark.slow
def test_a_run_writes_its_report(runs: Path) -> None:
    out = runs / "out"
    record = json.loads((out / "run.json").read_text())
    assert [entry["step"] for entry in record["log"] if "loss" in entry] == [1, 2, 3, 4]
    assert "train_runtime" in record["log"][-1] and record["finished"] >= record["started"]
    assert record["config"]["learning_rate"] == 1e-3  # as given, not multiplied
    assert record["config"]["wandb_name"] == HIDDEN and "axolotl_config_path" not in record["config"]
    assert record["resumed_at"] is None and record["versions"]["axolotl"]
    page = Page(out / "report" / "index.html")
    assert {"loss", "learning-rate", "gradient-norm", "zeros-by-layer"} <= page.figures
    assert "✓ Verified" in page.text and "evaluation" in page.text and "memory" not in page.figures
    assert "What is missing" not in page.text and not loads(page)


@pytest.mark.slow
def test_a_resumed_run_has_the_whole_log(runs: Path) -> None:
    record = json.loads((runs / "resumed" / "run.json").read_text())
    assert record["resumed_at"] == 2
    assert [entry["step"] for entry in record["log"] if "loss" in entry] == [1, 2, 3, 4]
    page = Page(runs / "resumed" / "report" / "index.html")
    assert "resumed at step 2" in page.text and "training time" not in page.text
