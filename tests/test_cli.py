"""The command line: `python -m axolotl_bitnet`, `axolotl-bitnet` and `axolotl bitnet` are one group."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from axolotl_bitnet.cli.main import main
from axolotl_bitnet.formats.export import export
from axolotl_bitnet.formats.registry import FOLDERS, FORMATS, output_dir_of
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.storage.progress import listening
from axolotl_bitnet.storage.safetensors_stream import SafetensorsWriter
from axolotl_bitnet.storage.weight_bytes import weight_bytes
from axolotl_bitnet.verify.verify import verify_checkpoint
from support.marks import slow_but
from support.zoo import HAS_GGUF, MADE, copy_of, flip_code, make_run


@pytest.fixture
def run_folder(tmp_path: Path, tiny_model: Callable[..., torch.nn.Module]) -> Path:
    model = tiny_model("Llama")
    convert_to_bitlinear(model)
    model.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def _json(*arguments: str | Path) -> Any:
    """What a command says as JSON: nothing else may be on stdout."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def _call(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_pack_then_verify(run_folder: Path) -> None:
    packed = run_folder / "packed"
    code, output = _call("pack", run_folder, packed)
    assert code == 0 and "MiB" in output
    code, output = _call("verify", packed)
    assert code == 0 and output.startswith(
        "codes and scales verified: 14 ternary layers"
    )  # no tokenizer there


def test_verify_fails_on_one_changed_code(run_folder: Path) -> None:
    packed = run_folder / "packed"
    _call("pack", run_folder, packed)
    path = packed / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.q_proj.weight"
    byte = int(tensors[name][3, 5])
    tensors[name][3, 5] = byte & ~3 | ((byte & 3) + 1) % 3
    save_file(tensors, path, {"format": "pt"})
    code, output = _call("verify", packed, "--against", run_folder)
    assert code == 1 and "model.layers.1.self_attn.q_proj: 1 of 4,096 codes differ" in output
    assert "1 in 1 layers; compared were" in output  # what differs comes before what was compared


def test_pack_refuses_an_existing_target_unless_told(run_folder: Path) -> None:
    packed = run_folder / "packed"
    assert _call("pack", run_folder, packed)[0] == 0
    code, output = _call("pack", run_folder, packed)
    assert code == 2 and "--overwrite" in output
    assert _call("pack", run_folder, packed, "--overwrite")[0] == 0


def test_errors_are_sentences(tmp_path: Path) -> None:
    code, output = _call("pack", tmp_path, tmp_path / "packed")
    assert code == 2 and "config.json does not exist" in output and "Traceback" not in output
    code, output = _call("verify", tmp_path)
    assert code == 2 and "Traceback" not in output


# Every format


COMMANDS = [("packed", ["pack"]), ("dense", ["revert"]), ("mlx", ["mlx"])]
COMMANDS += [("gguf-tq2_0", ["gguf"]), ("gguf-tq1_0", ["gguf", "--type", "tq1_0"])] if HAS_GGUF else []
COMMANDS += [("gguf-q2_0", ["gguf", "--type", "q2_0"])] if HAS_GGUF else []


@pytest.fixture(scope="module")
def whole_run(tiny_model: Callable[..., torch.nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tiny_model, tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(("name", "words"), slow_but(2, COMMANDS))
def test_every_writer(whole_run: Path, tmp_path: Path, name: str, words: list[str]) -> None:
    target = tmp_path / Path(FORMATS[name].path).name
    code, output = _call(*words, whole_run, target)
    assert code == 0 and f"{target}: " in output and "MiB" in output
    code, output = _call(*words, whole_run, target)
    assert code == 2 and "--overwrite" in output
    outcome = _json(*words, whole_run, target, "--overwrite", "--json")
    assert outcome == {
        "format": name,
        "path": str(target),
        "bytes": weight_bytes(target),
        "source_bytes": weight_bytes(whole_run),
    }
    code, output = _call("verify", target, "--against", whole_run, "--no-run")
    assert code == 0 and output.startswith("verified: 7 ternary layers") and "not checked" not in output
    if name != "packed":
        assert _call("restore", target, tmp_path / "restored")[0] == 0
        assert _call("verify", tmp_path / "restored", "--against", target, "--no-run")[0] == 0


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_export_writes_what_a_run_does_where_a_run_does(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run, ignore=shutil.ignore_patterns(*FOLDERS))
    latents = _files(run)
    code, output = _call("export", run, "--to", ",".join(MADE))
    assert code == 0, output
    assert [line.split(": ")[0] for line in output.splitlines()] == [
        str(run / FORMATS[name].path) for name in MADE
    ]
    made = _files(run)
    expected = {name: data for name, data in _files(whole_run).items() if name.split("/")[0] in FOLDERS}
    assert made.keys() == latents.keys() | expected.keys()
    for name in MADE:
        code, output = _call("verify", run / FORMATS[name].path, "--no-run")
        assert code == 0 and output.startswith("verified: 7 ternary layers"), output
    assert all(made[name] == data for name, data in expected.items() if "gguf" not in name)

    (run / "dense" / "config.json").write_text("{}")  # from an artifact, to its neighbours
    code, output = _call("export", run / "packed", "--to", "mlx,dense")
    assert code == 2 and "--overwrite" in output and (run / "dense" / "config.json").read_text() == "{}"
    outcome = _json("export", run / "packed", "--to", "mlx,dense,mlx", "--overwrite", "--json")
    assert [(each["format"], each["path"]) for each in outcome] == [
        (name, str(run / name)) for name in ("mlx", "dense")
    ]
    assert _files(run) == made


def test_export_elsewhere(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = _call("export", run_folder, "--to", "packed", "--output-dir", tmp_path / "new" / "place")
    assert code == 0 and (tmp_path / "new" / "place" / "packed" / "model.safetensors").exists(), output
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    code, output = _call("export", run_folder, "--to", "dense")
    assert code == 2 and "hub's cache" in output and "--output-dir" in output
    assert not (run_folder / "dense").exists()


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("run", "run"),
        ("run/packed", "run"),
        ("run/gguf", "run"),
        ("run/gguf/model-Q2_0.gguf", "run"),
        ("run/other.gguf", "run"),
        ("run/checkpoint-3", "run/checkpoint-3"),
        ("packed", "."),
    ],
)
def test_artifacts_lie_beside_the_source(
    source: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(source)
    if path.suffix:
        path.parent.mkdir(parents=True)
        path.touch()
    assert output_dir_of(path) == Path(folder)
    assert output_dir_of(tmp_path / path) == tmp_path / folder


def test_export_names_the_formats_it_knows(run_folder: Path) -> None:
    for text in ("packed,tq2_0", "", "packed,"):
        code, output = _call("export", run_folder, "--to", text)
        assert code == 2 and all(name in output for name in FORMATS), output
    assert f"unknown format '{text.split(',')[-1]}'" in output
    code, output = _call("export", run_folder)
    assert code == 2 and "--to" in output


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("taken", "notes.txt"),
        ("refused", "with full attention only"),
        ("no space for all of them", "no space"),
        ("only the weights tell", "NaN"),
    ],
)
def test_export_writes_all_or_nothing(
    whole_run: Path, tmp_path: Path, reason: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run, ignore=shutil.ignore_patterns(*FOLDERS))
    names = ["packed", "gguf-q2_0", "dense", "mlx"] if HAS_GGUF else ["packed", "dense", "mlx"]
    if reason == "taken":
        (run / "mlx").mkdir()
        (run / "mlx" / "notes.txt").write_text("mine")
    elif reason == "refused":  # by mlx alone
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"use_sliding_window": True}))
        names = ["packed", "dense", "mlx"]
    elif reason == "no space for all of them":  # but for each
        usage = shutil.disk_usage(run)
        free = weight_bytes(run) * 6 // 10  # dense takes half of what the latents do
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    else:
        tensors = load_file(run / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(tensors, run / "model.safetensors", {"format": "pt"})
    before = _files(run)
    if reason != "only the weights tell":
        fail = staticmethod(lambda *_, **__: pytest.fail("written before a refusal"))
        monkeypatch.setattr(SafetensorsWriter, "__init__", fail)
        monkeypatch.setattr("axolotl_bitnet.formats.gguf.writer._write", fail)
    code, output = _call("export", run, "--to", ",".join(names), "--overwrite")
    assert code == 2 and said in output, output
    assert _files(run) == before and {path.name for path in run.iterdir()} == {
        name.split("/")[0] for name in before
    }


@pytest.mark.skipif(not HAS_GGUF, reason="needs the gguf package")
@pytest.mark.slow
def test_embeddings_of_a_gguf_file(whole_run: Path, tmp_path: Path) -> None:
    from axolotl_bitnet.formats.gguf.writer import EMBEDDINGS

    sizes = {}
    for kind in EMBEDDINGS:  # all that can be written can be asked for
        outcome = _json("gguf", whole_run, tmp_path / f"{kind}.gguf", "--embeddings", kind, "--json")
        sizes[kind] = outcome["bytes"]
        code, output = _call("verify", tmp_path / f"{kind}.gguf", "--against", whole_run, "--no-run")
        assert code == 0 and output.startswith("verified: 7 ternary layers"), output
    assert sizes["q8_0"] < sizes["f16"] == sizes["bf16"]
    code, output = _call("gguf", whole_run, tmp_path / "x.gguf", "--embeddings", "q6_k")
    assert code == 2 and "q8_0" in output


@pytest.mark.slow
def test_verify_as_json(whole_run: Path, tmp_path: Path) -> None:
    outcome = _json("verify", whole_run / "packed", "--json", "-p", "Once", "--prompt", "Twice upon")
    assert outcome["ok"] is True and outcome["layers"] == 7
    checks = {check["name"]: check for check in outcome["checks"]}
    assert checks["logits"]["verdict"] == "same" and checks["logits"]["detail"].startswith("2 prompts")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo\nthree\n")
    outcome = _json("verify", whole_run / "packed", "--json", "--prompts", prompts)
    assert next(c for c in outcome["checks"] if c["name"] == "logits")["detail"].startswith("3 prompts")

    damaged, _ = copy_of(whole_run, "packed", tmp_path)
    flip_code(damaged, "packed", random.Random(0))
    code, output = _call("verify", damaged, "--against", whole_run, "--json")
    outcome = json.loads(output)
    assert code == 1 and outcome["ok"] is False
    assert outcome["checks"][0]["verdict"] == "differs" and outcome["checks"][0]["mismatches"]
    code, output = _call("verify", damaged, "--against", whole_run)
    assert code == 1 and output.startswith("NOT the trained model") and "differs" in output


def test_verify_finds_the_run_around_an_artifact(whole_run: Path, tmp_path: Path) -> None:
    for name in MADE:
        assert _call("verify", whole_run / FORMATS[name].path, "--no-run")[0] == 0
    assert _call("verify", whole_run, "--no-run")[0] == 0  # the latents, against its own fingerprint
    alone, _ = copy_of(whole_run, "packed", tmp_path)
    code, output = _call("verify", alone)
    assert code == 2 and "--against" in output


def test_inspect(whole_run: Path) -> None:
    code, output = _call("inspect", whole_run)
    assert code == 0 and "latents (trained by axolotl-bitnet" in output and "q_proj" in output
    outcome = _json("inspect", whole_run / "packed", "--json")
    assert outcome["kind"] == "packed" and len(outcome["layers"]) == 7 and outcome["refused"]
    code, output = _call("inspect", whole_run / "packed")
    assert code == 0 and "refused: training: it is packed" in output


def test_inspect_sums_up_by_projection(run_folder: Path) -> None:
    """Latents and their packed model in one order, whatever the order of the files."""
    _call("pack", run_folder, run_folder / "packed")

    def rows(*words: object) -> list[str]:
        code, output = _call("inspect", *words)
        assert code == 0
        return [
            line.split()[1] for line in output.splitlines() if re.match(r"[│|] \S+_proj\b|[│|] model\.", line)
        ]

    for words in ((), ("--layers",)):
        latents, packed = rows(run_folder, *words), rows(run_folder / "packed", *words)
        assert latents == packed and len(latents) == (14 if words else 7)
    layers = [layer["name"] for layer in _json("inspect", run_folder, "--json")["layers"]]
    assert layers == [layer["name"] for layer in _json("inspect", run_folder / "packed", "--json")["layers"]]


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_file_that_is_no_model_is_not_taken_for_gguf(run_folder: Path, command: str) -> None:
    for name in ("bitnet.json", "model.safetensors"):
        (run_folder / "bitnet.json").write_text("{}")
        code, output = _call(command, run_folder / name)
        assert code == 2 and f"{name} is not a model" in output and "gguf" not in output


def test_json_is_alone_on_stdout() -> None:
    """Libraries may print anything before and meanwhile."""
    code = (
        "import sys; print('a banner')\n"
        "from axolotl_bitnet.cli import terminal\n"
        "@terminal.command\n"
        "def run(machine):\n"
        "    print('from a library')\n"
        "    terminal.as_json({'ok': True})\n"
        "run(machine=sys.argv[1] == '--json')\n"
        "print('after')\n"
    )
    for word, out, err in (
        ("--json", '{\n  "ok": true\n}\nafter\n', "a banner\nfrom a library\n"),
        ("", 'a banner\nfrom a library\n{\n  "ok": true\n}\nafter\n', ""),
    ):
        command, buffered = [sys.executable, "-c", code, word], os.environ.copy()
        buffered.pop("PYTHONUNBUFFERED", None)
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=buffered)
        assert (done.stdout, done.stderr) == (out, err)


def test_json_is_refused_where_axolotls_banner_came_first(run_folder: Path) -> None:
    """Axolotl's own group prints, and colorama flushes it, before it imports anything of ours."""
    outer = click.Group("axolotl", commands={"bitnet": main})
    result = CliRunner().invoke(outer, ["bitnet", "inspect", str(run_folder), "--json"])
    assert result.exit_code == 2 and "Run `axolotl-bitnet inspect ... --json`" in result.stderr
    assert CliRunner().invoke(outer, ["bitnet", "inspect", str(run_folder)]).exit_code == 0


def test_overwrite_replaces_nothing_of_the_users(run_folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "checkpoint-3").mkdir(parents=True)
    (precious / "notes.txt").write_text("mine")
    for command in ("pack", "revert", "mlx", "gguf"):
        code, output = _call(command, run_folder, precious, "--overwrite")
        assert code == 2 and ("checkpoint-3, notes.txt" in output or command == "gguf")
    (precious / "model.bin").write_text("mine")
    code, output = _call("pack", run_folder, precious / "model.bin", "--overwrite")
    assert code == 2 and "is a file" in output
    assert {path.name for path in precious.iterdir()} == {"checkpoint-3", "notes.txt", "model.bin"}
    code, output = _call("pack", run_folder, run_folder, "--overwrite")
    assert code == 2 and "would replace its own source" in output
    for _ in range(2):
        assert _call("pack", run_folder, tmp_path / "packed", "--overwrite")[0] == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_full_disk_is_seen_before_anything_is_written(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(SafetensorsWriter, "write", lambda *_: pytest.fail("written to a full disk"))
    for name, words in COMMANDS:
        code, output = _call(*words, whole_run, tmp_path / name)
        assert code == 2 and "no space" in output and "1,000 are free" in output, output
        assert "bytes are needed" in output and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "words"), COMMANDS)
def test_progress_is_told_in_bytes(whole_run: Path, tmp_path: Path, name: str, words: list[str]) -> None:
    told: dict[str, list[int]] = {}

    def begin(what: str, total: int) -> Callable[[int], None]:
        assert what not in told
        told[what] = [total, 0]

        def advance(count: int) -> None:
            told[what][1] += count

        return advance

    target = tmp_path / Path(FORMATS[name].path).name
    with listening(begin):
        export(name, whole_run, target)
        verify_checkpoint(target, whole_run)
    assert len(told) == 3 and all(total == done > 0 for total, done in told.values()), told
    size = next(total for what, (total, _) in told.items() if what.startswith("writing"))
    assert 0.9 * weight_bytes(target) < size <= weight_bytes(target)


SLOWLY = """
import sys, time
from axolotl_bitnet.formats.gguf import writer
from axolotl_bitnet.storage import safetensors_stream as stream
from axolotl_bitnet.cli.main import main

def slowly(function):
    def run(*arguments):
        time.sleep(0.2)
        return function(*arguments)
    return run

stream.SafetensorsWriter.write = slowly(stream.SafetensorsWriter.write)
writer._stored = slowly(writer._stored)
main(sys.argv[1:])
"""


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("words", [["pack"], pytest.param(["gguf"], marks=pytest.mark.slow)])
def test_ctrl_c_leaves_nothing_behind(whole_run: Path, tmp_path: Path, words: list[str]) -> None:
    """A real SIGINT while the file is being written."""
    if words == ["gguf"] and not HAS_GGUF:
        pytest.skip("needs the gguf package")
    target = tmp_path / "target"
    command = [sys.executable, "-c", SLOWLY, *words, str(whole_run), str(target)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not list(tmp_path.glob(".target.partial-*")):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "nothing was left behind" in errors and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_copied_once(tmp_path: Path) -> None:
    target = tmp_path / "recipes"
    code, output = _call("recipes", target)
    assert code == 0 and "sft.yaml" in output
    names = {path.name for path in target.iterdir()}
    assert {"sft.yaml", "sft-1b.yaml", "dpo.yaml", "convert.yaml", "README.md", "tiny"} <= names
    (target / "sft.yaml").write_text("mine")
    code, output = _call("recipes", target)
    assert code == 2 and "not empty" in output and (target / "sft.yaml").read_text() == "mine"


def test_help_of_every_command_has_an_example() -> None:
    context = click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        code, output = _call(name, "--help")
        assert code == 0 and "Example" in output and command is not None and command.help
        assert command.name == name and f"  {name} " in _call("--help")[1]
    code, output = _call("nothing")
    assert code == 2 and "No such command" in output


def test_every_command_is_on_its_page_and_no_help_is_cut_off() -> None:
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    for name in main.list_commands(click.Context(main)):
        assert f"\n| `{name}" in page, name
    for words in ([], *([name] for name in main.list_commands(click.Context(main)))):
        result = CliRunner().invoke(main, [*words, "--help"], terminal_width=80)
        assert "..." not in result.output.replace("[ARGS]...", ""), result.output
        assert max(map(len, result.output.splitlines())) <= 80, result.output
    assert main.get_short_help_str() == "Ternary (1.58-bit) models."  # what `axolotl --help` shows, whole


def test_module_and_entry_points_lead_here() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "axolotl_bitnet", "--help"], capture_output=True, text=True, check=True
    )
    assert "python -m axolotl_bitnet" in result.stdout and "verify" in result.stdout
    (command,) = [point for point in entry_points(group="axolotl.cli_commands") if point.name == "bitnet"]
    assert command.load() is main
    (plugin,) = [point for point in entry_points(group="axolotl.plugins") if point.name == "bitnet"]
    assert plugin.value == "axolotl_bitnet:BitNetPlugin"  # another spelling would load it twice
    (script,) = [point for point in entry_points(group="console_scripts") if point.name == "axolotl-bitnet"]
    assert script.load() is main
