from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from axolotl_bitnet.report import ReportError, write_report
from axolotl_bitnet.report import page as page_module
from axolotl_bitnet.report.charts import charts, grids
from axolotl_bitnet.report.draw import _LIGHT, _curves
from axolotl_bitnet.report.record import HIDDEN, redact
from axolotl_bitnet.report.run_files import Run, TrainedLayer, read_run, row_and_column
from support import reports
from support.marks import slow_but
from support.reports import Page, loads, page_of

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed"),
]

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path) -> None:
    page = page_of(reports.whole(tmp_path / "my-run"))
    assert page.figures == {
        "loss", "flips", "flips-total", "zeros", "scale-drift", "frozen", "learning-rate", "gradient-norm",
        "throughput", "memory", "zeros-by-layer", "flips-by-layer", "drift-by-layer",
    }  # fmt: skip
    assert "my-run" in page.text and "SFT" not in page.text
    for words in (
        "supervised fine-tuning of org/base on NVIDIA H200 · finished 2026-05-04 10:05:12 UTC",
        "✓ Verified packed: 110,592 codes and 21 scales are the trained ones, exactly.",
        "evaluation, fully ternary 2.75 → 2.75",
        "evaluation loss 2.5",
        "0:05:12",
        "13.5 GiB",
        "1.0 MiB",
        "axolotl-bitnet verify",
        "base_model: org/base",
        "0.21.0",
        "abab",
        "model.layers.2.mlp.down_proj 64 × 128 25 % 12.5 % 50 %",
    ):
        assert words in page.text, words
    assert "What is missing" not in page.text


COMPLETION = {"datasets": [{"path": "text.jsonl", "type": "completion"}]}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "supervised fine-tuning of org/base"),
        ({"datasets": [*COMPLETION["datasets"], {"type": "chat_template"}]}, "supervised fine-tuning of"),
        ({"datasets": "text.jsonl"}, "supervised fine-tuning of org/base"),
        ({"rl": "dpo"}, "DPO of org/base"),
        (COMPLETION, "continued pretraining of org/base"),
        ({"pretraining_dataset": [{"path": "text"}]}, "continued pretraining of org/base"),
        (COMPLETION | {"reinit_weights": True}, "pretraining of random weights of the shape of org/base"),
    ],
)
def test_how_it_was_trained(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    run = reports.record([{"step": 1, "loss": 1.0}], config={"base_model": "org/base"} | config)
    assert f"{words} " in page_of(reports.write(tmp_path / "run", run=run)).text


@pytest.mark.parametrize(("ternary", "shown"), [(2.75, True), (2.5, False), (None, False)])
def test_ternary_loss_is_shown_where_it_is_another(
    tmp_path: Path, ternary: float | None, shown: bool
) -> None:
    entry = {"step": 1, "eval_loss": 2.5} | ({} if ternary is None else {"eval_ternary_loss": ternary})
    page = page_of(reports.write(tmp_path / "run", run=reports.record([entry])))
    assert ("ternary evaluation loss" in page.text) == shown
    assert "evaluation loss 2.5" in page.text


@pytest.mark.parametrize("factor", [1.0, 1.001, 1.5])
def test_rounding_does_not_fill_an_axis(tmp_path: Path, factor: float) -> None:
    zeros = [0.32 if step % 2 else 0.32 * factor for step in range(6)]
    run = reports.record([{"step": 1 + i, "loss": 1.0, "bitnet/zeros": z} for i, z in enumerate(zeros)])
    (chart,) = (
        one for one in charts(read_run(reports.write(tmp_path / "run", run=run))) if one.slug == "zeros"
    )
    figure = _curves(chart, _LIGHT, legend=False)
    low, high = figure.axes[0].get_ylim()
    assert low < 0.32 and high > 0.32 * factor
    assert high - low == pytest.approx(max(0.05 * 0.32 * factor, 0.32 * (factor - 1)), rel=0.2)


@pytest.mark.slow
def test_it_loads_nothing_and_is_accessible(tmp_path: Path) -> None:
    page = page_of(reports.whole(tmp_path / "run"))
    assert not loads(page)
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1
    assert any("width=device-width" in meta.get("content", "") for meta in page.all("meta"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    pictures = page.all("svg")
    assert len(pictures) == len(page.figures)
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 20 for svg in pictures)
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert max(ids.values()) == 1, ids.most_common(3)
    referred = set(re.findall(r'(?:url\(#|href="#)([^)"]*)', page.source))
    assert referred <= set(ids)
    colours = set(re.findall(r"var\((--[\w-]+)\)", page.source))
    for theme in page.styles.split(":root")[1:]:
        assert colours <= set(re.findall(r"(--[\w-]+):", theme.split("}")[0])), "a colour without a value"
    assert "#0102" not in page.source


@pytest.mark.slow
def test_pictures_lie_beside_it(tmp_path: Path) -> None:
    written = write_report(reports.whole(tmp_path / "run"))
    pictures = {path.stem: path.read_bytes() for path in written.parent.glob("*.png")}
    assert set(pictures) == Page(written).figures
    assert all(data.startswith(PNG) and b"IEND" in data[-12:] for data in pictures.values())
    assert {path.suffix for path in written.parent.iterdir()} == {".png", ".html"}


@pytest.mark.slow
def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = reports.whole(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "$x_{$ \\frac",
    "]]></svg><b onclick='x'>&amp;",
]


@pytest.mark.parametrize("bad", slow_but(1, HOSTILE))
def test_hostile_names_are_text(tmp_path: Path, bad: str) -> None:
    layer = f"model.layers.0.{bad.replace('.', '')}"
    entries = [{"step": 1, "loss": 1.0, f"bitnet/scale_drift/{bad}": 0.1, f"other {bad}": 1.5}]
    artifacts = {
        f"odd {bad}": {"verified": False, "mismatches": [bad], "path": bad, "bytes": 5},
        "packed": {"verified": True, "path": bad, "bytes": 5},
    }
    run = reports.record(entries, machine=bad, versions={bad: bad}, config={"base_model": bad, bad: [bad]})
    folder = reports.write(
        tmp_path / "<b>&'\"",
        run=run,
        bitnet=reports.proof([layer], artifacts=artifacts),
        monitor=reports.moved([layer]),
    )
    page = page_of(folder)
    assert not loads(page)
    assert {tag for tag, _ in page.elements} <= {
        "html", "head", "meta", "link", "title", "style", "body", "header", "main", "footer", "section", "p",
        "h1", "h2", "h3", "strong", "span", "dl", "div", "dt", "dd", "figure", "figcaption", "svg", "g",
        "defs", "path", "text", "use", "clippath", "rect", "ul", "li", "i", "b", "details", "summary",
        "table", "thead", "tbody", "tr", "th", "td", "pre", "code",
    }  # fmt: skip
    assert not [pair for pair in page.elements if pair[0] == "b" and pair[1]]
    assert page.text.count(" ".join(bad.split())) >= 8
    assert "49" not in page.text.split("Config and versions")[1]


SECRETS: list[tuple[str, Any]] = [
    ("hub_token", "abc"),
    ("wandb_api_key", "abc"),
    ("comet_api_key", "abc"),
    ("swanlab_lark_webhook_url", "https://example.org/abc"),
    ("swanlab_lark_secret", "abc"),
    ("aws_secret_access_key", "abc"),
    ("aws_access_key_id", "abc"),
    ("key", "abc"),
    ("password", 12345),
    ("base_model", "hf_abcdefghijklmnopqrstuvwxyz"),
    ("dataset", "https://me:abc@example.org/data"),
    ("path", "https://example.org/data?x=1&token=abc"),
]


@pytest.mark.parametrize(("key", "value"), SECRETS)
def test_secrets_are_hidden(key: str, value: Any) -> None:
    for config in ({key: value}, {"datasets": [{"storage_options": {key: value}}]}, {key: [value, value]}):
        text = json.dumps(redact(config))
        assert HIDDEN in text and "abc" not in text and "12345" not in text


def test_secrets_in_a_record_of_others_are_hidden_too(tmp_path: Path) -> None:
    """A run.json that this package did not write, or that was edited."""
    page = page_of(reports.write(tmp_path / "run", run=reports.record([], config=dict(SECRETS))))
    assert page.text.count(HIDDEN) >= len(SECRETS)
    assert "abc" not in page.source and "12345" not in page.source


def test_what_is_no_secret_is_shown() -> None:
    config = {
        "special_tokens": {"pad_token": "<|pad|>", "eos_token": "</s>"},
        "tokens": ["<think>"],
        "eot_tokens": ["<|im_end|>"],
        "hf_use_auth_token": True,
        "overrides_of_model_config": {"num_key_value_heads": 2},
        "message_property_mappings": {"role": "role"},
        "base_model": "tiiuae/Falcon-E-3B-Base@prequantized",
        "learning_rate": 5e-5,
        "include_tokens_per_second": True,
    }
    assert redact(config) == config
    assert redact({"a": None, "b": (1, {2: None})}) == {"b": [1, {}]}


def test_only_proof_is_left(tmp_path: Path) -> None:
    page = page_of(reports.write(tmp_path / "run", bitnet=reports.proof(reports.names(2))))
    assert page.figures == {"zeros-by-layer"}
    assert "There is no run.json: the config and the versions are not known." in page.text
    assert "No log was found: there are no curves." in page.text
    assert "✓ Verified" in page.text and "Course" not in page.text and "nan" not in page.text.lower()


@pytest.mark.slow
def test_a_killed_run_has_the_log_of_its_last_checkpoint(tmp_path: Path) -> None:
    folder = reports.write(tmp_path / "run", run=reports.record([], finished=None))
    for step in (9, 10, 20):
        state = {"log_history": reports.log(step, monitor=False), "global_step": step}
        reports.write(folder / f"checkpoint-{step}", trainer_state=state)
    (folder / "checkpoint-20" / "trainer_state.json").write_text('{"log_history": [')
    page = page_of(folder)
    assert "begun, not known to have finished" in page.text
    assert "The log is that of checkpoint-10" in page.text and "checkpoint-20" in page.text
    assert "steps 10 " in page.text and "There are no artifacts." in page.text
    assert page.figures == {"loss", "learning-rate", "gradient-norm", "throughput", "memory"}


@pytest.mark.slow
def test_an_earlier_runs_files_are_not_this_runs(tmp_path: Path) -> None:
    folder = reports.write(tmp_path / "run", run=reports.record([], finished=None))
    reports.write(folder / "checkpoint-9", trainer_state={"log_history": reports.log(9), "global_step": 9})
    reports.write(folder, monitor=reports.moved(reports.names(1)))
    for path in (folder / "checkpoint-9" / "trainer_state.json", folder / "monitor.json"):
        os.utime(path, (1.0e9, 1.0e9))
    page = page_of(folder)
    assert not page.figures and "No log was found" in page.text and "monitor.json is an earlier" in page.text
    reports.write(folder, run=reports.record([], finished=None, resumed_at=9))
    page = page_of(folder)
    assert {"loss", "flips-by-layer"} <= page.figures and "resumed at step 9" in page.text


def test_a_preference_run_without_evaluation_and_monitor(tmp_path: Path) -> None:
    entries = [
        {
            "step": step,
            "loss": 0.69 / step,
            "rewards/margins": 0.1 * step,
            "rewards/chosen": 0.1,
            "rewards/rejected": -0.1,
            "rewards/accuracies": 0.5,
            "logps/chosen": -31.0,
            "learning_rate": 1e-6,
            "memory/max_active (GiB)": 0.0,
        }
        for step in range(1, 8)
    ]
    folder = reports.write(
        tmp_path / "run", run=reports.record(entries, config={"rl": "dpo", "base_model": "b"})
    )
    page = page_of(folder)
    assert page.figures == {"loss", "rewards", "preferred", "learning-rate"}
    assert "DPO of b on" in page.text and "logps/chosen -31 → -31" in page.text
    assert "pairs ranked right 50 %" in page.text and "evaluation" not in page.text


@pytest.mark.slow
def test_values_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    entries = reports.log(6, monitor=False)
    entries[1]["loss"] = math.nan
    entries[2]["loss"] = math.inf
    for entry in entries:
        entry["grad_norm"] = math.nan
    page = page_of(reports.write(tmp_path / "run", run=reports.record(entries)))
    assert "2 logged values of “Loss, training” are not finite and left out." in page.text
    assert "never finite" in page.text


@pytest.mark.parametrize(
    "text", slow_but(1, ["{", "", "[]", "null", '{"log": 5, "config": [], "versions": 3, "artifacts": 7}'])
)
@pytest.mark.parametrize("name", ["run", "bitnet", "monitor"])
def test_damaged_files_are_named_and_left_out(tmp_path: Path, name: str, text: str) -> None:
    files = {"run": reports.record([{"step": 1, "loss": 1.0}]), "bitnet": reports.proof(reports.names(1))}
    folder = reports.write(tmp_path / "run", **(files | {"monitor": reports.moved([]), name: text}))
    page = page_of(folder)
    assert (f"{name}.json" in page.text.split("Course")[0]) == (not text.startswith('{"log')) or name == "run"
    assert not loads(page)


@pytest.mark.slow
def test_damaged_values_are_left_out(tmp_path: Path) -> None:
    odd: list[Any] = [None, "x", True, [], {}, -1, 0, "1e5"]
    for value in odd:
        folder = reports.write(
            tmp_path / "run",
            run=reports.record(
                [{"step": 1, "loss": value}, {"step": value, "loss": 1.0}, value], started=value
            ),
            bitnet={
                "artifacts": {"packed": value, "b": {"verified": value, "path": value, "bytes": value}},
                "fingerprint": {"tensors": {"a.0.b": value, "a.1.b": {"shape": value, "zeros": value}}},
            },
            monitor={"layers": {"a.0.b": value, "a.2.b": {"scale": value, "scale_start": value}}},
        )
        assert "Ternary training report" in page_of(folder).text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"holds no run: none of run\.json, bitnet\.json.*output_dir"):
        write_report(tmp_path)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ReportError, match="is not a folder"):
        write_report(tmp_path / "nothing")


def test_failed_verification_is_what_one_sees_first(tmp_path: Path) -> None:
    lines = [f"model.layers.{i}.mlp.up_proj: codes differ" for i in range(30)]
    artifacts = {
        "packed": {"verified": False, "mismatches": lines},
        "mlx": {"verified": True, "mismatches": [], "path": "mlx", "bytes": 5},
        "dense": {"verified": None, "path": "dense", "bytes": 5},
    }
    page = page_of(
        reports.write(tmp_path / "run", bitnet=reports.proof(reports.names(1), artifacts=artifacts))
    )
    assert "✗ Not the trained model packed:" in page.text and "✓" not in page.text
    assert lines[19] in page.text and lines[20] not in page.text and "and 10 more" in page.text
    assert "vllm serve" in page.text and "/packed" not in page.text and "in transformers" in page.text


def test_an_artifact_that_could_not_be_made_is_told_from_a_wrong_one(tmp_path: Path) -> None:
    artifacts = {
        "packed": {"verified": True, "mismatches": [], "path": "packed", "bytes": 5},
        "mlx": {"verified": False, "error": "no space left on device"},
    }
    page = page_of(
        reports.write(tmp_path / "run", bitnet=reports.proof(reports.names(1), artifacts=artifacts))
    )
    assert "✗ Not made mlx: the reason is below. packed: 36,864 codes" in page.text
    assert "mlx not made – no space left on device" in page.text and "NOT the trained" not in page.text
    assert "from_pretrained" in page.text and "mlx_lm" not in page.text


def test_without_verification_nothing_is_claimed(tmp_path: Path) -> None:
    artifacts = {"packed": {"verified": None, "path": "packed", "bytes": 5}}
    page = page_of(
        reports.write(tmp_path / "run", bitnet=reports.proof(reports.names(1), artifacts=artifacts))
    )
    assert "– Not verified" in page.text and "✓" not in page.text


@pytest.mark.slow
def test_long_logs_are_thinned_not_cut(tmp_path: Path) -> None:
    entries = [{"step": s, "loss": float(s % 2)} for s in range(1, 10_001)]
    run = read_run(reports.write(tmp_path / "run", run=reports.record(entries)))
    (chart,) = charts(run)
    (line,) = chart.series
    assert len(line.values) <= 302 and (line.steps[0], line.steps[-1]) == (1, 10_000)
    assert (line.values[0], line.values[-1]) == (1, 0)
    assert line.values[1:-1] == pytest.approx([0.5] * (len(line.values) - 2), abs=0.2)
    assert len(write_report(run.folder).read_bytes()) < 100_000


@pytest.mark.parametrize(
    ("scope", "labels", "factor"),
    [("all", ["all parameters"], 1), ("ternary", ["ternary layers", "norms"], 10)],
)
def test_rates_by_scope(tmp_path: Path, scope: str, labels: list[str], factor: float) -> None:
    config = {"bitnet": {"learning_rate_multiplier": 10, "learning_rate_scope": scope}}
    entries = [{"step": 1, "learning_rate": 0.5}, {"step": 2, "learning_rate": 0.25}]
    (chart,) = charts(read_run(reports.write(tmp_path, run=reports.record(entries, config=config))))
    assert [line.label.split(",")[0] for line in chart.series] == labels
    assert chart.series[0].values == [0.5 * factor, 0.25 * factor]


def test_where_layers_stand() -> None:
    assert row_and_column("model.layers.3.self_attn.q_proj") == ("layers.3", "q_proj")
    assert row_and_column("model.vision.blocks.12.fc1") == ("vision.blocks.12", "fc1")
    assert row_and_column("model.layers.3.mlp.experts.7.w1") == ("layers.3", "*.w1")
    assert row_and_column("0") == ("0", "0")
    assert row_and_column("encoder.proj") == ("encoder", "proj")


def test_curves_end_with_the_last_step() -> None:
    """The Trainer logs once more after training, under the last step's number and with its memory freed."""
    log = [{"step": step, "loss": 1.0, "memory/max_allocated (GiB)": 10.0 + step} for step in (1, 2)]
    log.append({"step": 2, "train_runtime": 3.0, "memory/max_allocated (GiB)": 0.5})
    (memory,) = [chart for chart in charts(Run(Path("run"), log=log)) if chart.slug == "memory"]
    (line,) = memory.series
    assert line.steps == [1, 2] and line.values == [11.0, 12.0]


def test_grids_order_layers_and_average_experts() -> None:
    layers = [
        TrainedLayer(f"m.{i}.mlp.{p}", (8, 8), zeros=i / 100)
        for i in (10, 9)
        for p in ("down_proj", "up_proj")
    ]
    layers += [TrainedLayer("m.9.e.0.w1", (1, 3), zeros=0.5), TrainedLayer("m.9.e.1.w1", (1, 1), zeros=0.1)]
    (grid,) = grids(layers)
    assert (grid.rows, grid.columns) == (["m.9", "m.10"], ["up_proj", "down_proj", "*.w1"])
    assert grid.values[0] == pytest.approx([0.09, 0.09, 0.4])
    assert grid.values[1] == [0.1, 0.1, None]


@pytest.mark.slow
def test_the_old_report_stays_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = reports.whole(tmp_path / "run", layers=1)
    before = write_report(run).read_bytes()

    def fail(*_: Any) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(page_module, "render", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(run)
    assert (run / "report" / "index.html").read_bytes() == before
    assert {path.name for path in run.iterdir()} == {"run.json", "bitnet.json", "monitor.json", "report"}
