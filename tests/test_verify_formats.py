"""One change anywhere in an artifact of any format is found, and called what it is."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from axolotl_bitnet.formats.export import export
from axolotl_bitnet.formats.registry import FORMATS
from axolotl_bitnet.formats.restore import restore_latents
from axolotl_bitnet.storage.atomic import CheckpointError
from axolotl_bitnet.verify.logits import PROMPTS
from axolotl_bitnet.verify.report import VerificationReport
from axolotl_bitnet.verify.verify import verify_checkpoint
from support.marks import slow_but
from support.stored import edit_config
from support.zoo import (
    HAS_GGUF,
    MADE,
    Q,
    change_config,
    change_norm,
    change_scale,
    change_tokenizer,
    copy_of,
    edit_tensors,
    flip_code,
    make_run,
)

KINDS = ["latents", *MADE]


@pytest.fixture(scope="module")
def run(tiny_model: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tiny_model, tmp_path_factory.mktemp("run"), attention_bias=True)


def verdicts(report: VerificationReport) -> dict[str, str]:
    return {check.name: check.verdict for check in report.checks}


STORED = ("codes", "scales", "other tensors", "config", "tokenizer")


@pytest.mark.parametrize("kind", KINDS)
def test_untouched(run: Path, tmp_path: Path, kind: str) -> None:
    artifact, reference = copy_of(run, kind, tmp_path)
    report = verify_checkpoint(artifact, reference)
    assert report.ok and verdicts(report) == dict.fromkeys(STORED, "same"), report.mismatches
    assert report.to_json()["ok"] is True and len(report.to_json()["checks"]) == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", slow_but(1, range(6)))
def test_one_flipped_code(run: Path, tmp_path: Path, kind: str, seed: int) -> None:
    artifact, reference = copy_of(run, kind, tmp_path)
    flip_code(artifact, kind, random.Random(f"{kind} {seed}"))
    report = verify_checkpoint(artifact, reference)
    assert not report.ok and verdicts(report)["codes"] == "differs"
    assert verdicts(report)["other tensors"] == "same"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", slow_but(1, range(2)))
def test_one_changed_scale(run: Path, tmp_path: Path, kind: str, seed: int) -> None:
    artifact, reference = copy_of(run, kind, tmp_path)
    change_scale(artifact, kind, random.Random(f"{kind} {seed}"))
    report = verify_checkpoint(artifact, reference)
    assert not report.ok
    assert "differs" in (verdicts(report)["codes"], verdicts(report).get("scales"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "name"),
    [(change_norm, "other tensors"), (change_tokenizer, "tokenizer"), (change_config, "config")],
    ids=["norm", "tokenizer", "config"],
)
def test_one_change_beside_the_codes(
    run: Path, tmp_path: Path, kind: str, change: Callable[[Path, str], None], name: str
) -> None:
    artifact, reference = copy_of(run, kind, tmp_path)
    change(artifact, kind)
    report = verify_checkpoint(artifact, reference, PROMPTS)
    assert not report.ok
    found = verdicts(report)
    assert found.pop("running") == "not checked"  # what differs already is not run
    assert found == {check: "differs" if check == name else "same" for check in STORED}


@pytest.mark.skipif(not HAS_GGUF, reason="needs the gguf package")
def test_what_llama_cpp_reads_is_compared_too(run: Path, tmp_path: Path) -> None:
    """It knows its own keys, not the config that lies beside them."""
    artifact, reference = copy_of(run, "gguf-tq2_0", tmp_path)
    data = artifact.read_bytes()
    key = b"llama.rope.freq_base"
    place = data.index(key) + len(key) + 4
    artifact.write_bytes(data[:place] + b"\x00\x00\x80\x3f" + data[place + 4 :])
    report = verify_checkpoint(artifact, reference)
    assert report.mismatches == ["config: llama.rope.freq_base is 1.0, trained 10000.0"]


def test_tensors_and_files_that_come_or_go(run: Path, tmp_path: Path) -> None:
    artifact, _ = copy_of(run, "packed", tmp_path)
    edit_tensors(artifact, lambda tensors: tensors.update(extra=tensors.pop("model.norm.weight")))
    (artifact / "generation_config.json").unlink()
    (artifact / "additional_chat_templates").mkdir()
    (artifact / "additional_chat_templates" / "tools.jinja").write_text("other answers")
    assert verify_checkpoint(artifact, run).mismatches == [
        "'model.norm.weight' is missing",
        "'extra' was not in training",
        "generation_config.json is missing",
        "additional_chat_templates/tools.jinja was not there in training",
    ]


def test_only_a_fingerprint_says_what_was_not_checked(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "bitnet.json", tmp_path)
    report = verify_checkpoint(run / "packed", tmp_path, PROMPTS)
    assert report.ok
    expected = {"codes": "same", "scales": "same"}
    assert verdicts(report) == expected | dict.fromkeys((*STORED[2:], "running"), "not checked")
    assert "no latents to compare with" in report.checks[2].detail
    assert report.summary().startswith("codes and scales verified: ")
    assert report.summary().endswith("; not checked: other tensors, config, tokenizer, running")
    itself = verify_checkpoint(run, run)  # the saved latents against the fingerprint of what trained
    assert itself.ok and verdicts(itself)["config"] == "not checked"


@pytest.mark.slow
def test_an_artifact_is_a_reference_too(run: Path, tmp_path: Path) -> None:
    """Latents restored from a packed model, compared with that model."""
    latents = restore_latents(run / "packed", tmp_path / "latents")
    report = verify_checkpoint(latents, run / "packed", PROMPTS)
    assert report.ok and set(verdicts(report).values()) == {"same"} and "logits" in verdicts(report)


@pytest.mark.parametrize("kind", ["packed", "dense"])
@pytest.mark.slow
def test_it_runs_as_trained(run: Path, kind: str) -> None:
    report = verify_checkpoint(run / FORMATS[kind].path, run, PROMPTS)
    found = verdicts(report)
    assert report.ok and found["logits"] == found["greedy tokens"] == "same"
    assert found.get("8-bit activations") == {"packed": None, "dense": "not checked"}[kind]


@pytest.mark.slow
def test_a_model_that_runs_otherwise_is_found(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored the same, but transformers computes another: here, with one value of the embedding changed."""
    from axolotl_bitnet.verify import logits as running

    load = running._LOADERS["packed"]

    def broken(packed: object) -> nn.Module:
        model = load(packed)  # type: ignore[arg-type]
        with torch.no_grad():
            model.get_input_embeddings().weight *= 1.5  # type: ignore[operator]
            model.get_output_embeddings().weight[:, ::2] *= -1  # type: ignore[operator]
        return model

    monkeypatch.setitem(running._LOADERS, "packed", broken)
    found = verdicts(verify_checkpoint(run / "packed", run, PROMPTS))
    assert found["logits"] == found["greedy tokens"] == "differs" and found["codes"] == "same"


@pytest.mark.skipif(not HAS_GGUF, reason="needs the gguf package")
@pytest.mark.slow
def test_gguf_in_llama_cpp(run: Path) -> None:
    pytest.importorskip("xllamacpp")
    report = verify_checkpoint(run / FORMATS["gguf-tq2_0"].path, run, PROMPTS)
    assert report.ok and verdicts(report)["greedy tokens"] == "same"


@pytest.mark.skipif(not HAS_GGUF, reason="needs the gguf package")
def test_gguf_without_llama_cpp_says_so(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "xllamacpp", None)
    report = verify_checkpoint(run / FORMATS["gguf-tq2_0"].path, run, PROMPTS)
    assert report.ok and verdicts(report)["running"] == "not checked"
    assert "pip install xllamacpp" in report.checks[-1].detail


def test_the_reference_for_other_tensors_may_be_rounded_once_more(run: Path, tmp_path: Path) -> None:
    """Written from the packed model, which had rounded to bfloat16 already."""
    for name in MADE:
        again = export(name, run / "packed", tmp_path / FORMATS[name].path)
        assert verify_checkpoint(again, run).ok
    name = f"{Q}.bias"  # not a rounding: float32 latents' low bits in a bfloat16's place
    edit_tensors(tmp_path / "packed", lambda tensors: tensors[name].add_(1))
    assert verify_checkpoint(tmp_path / "packed", run).mismatches == [f"'{name}' differs"]


# What a program says of an artifact, and models with code of their own


@pytest.mark.parametrize("name", slow_but(2, MADE))
def test_whatever_a_program_raises_is_a_failed_check(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from axolotl_bitnet.verify import engines
    from axolotl_bitnet.verify import logits as running

    def fails(*args: object) -> object:
        raise RuntimeError("cannot find\n tokenizer merges")

    family = name.split("-")[0]
    if family in engines.ENGINES:
        monkeypatch.setitem(engines.ENGINES, family, (engines.ENGINES[family][0], fails))  # type: ignore[arg-type]
    else:
        monkeypatch.setitem(running._LOADERS, family, fails)  # type: ignore[arg-type]
    report = verify_checkpoint(run / FORMATS[name].path, run, PROMPTS)
    consumer = engines.consumer_of(name)
    assert report.mismatches == [f"{consumer} cannot run it: cannot find tokenizer merges"]


@pytest.mark.skipif(not HAS_GGUF, reason="needs the gguf package")
def test_bytes_appended_to_a_gguf_file(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes((run / FORMATS["gguf-tq2_0"].path).read_bytes() + b"more" * 100)
    with pytest.raises(CheckpointError, match="400 bytes follow its last tensor"):
        verify_checkpoint(file, run, PROMPTS)


def test_code_of_the_model_s_own_travels_and_never_runs(run: Path, tmp_path: Path) -> None:
    latents = tmp_path / "latents"
    shutil.copytree(
        run, latents, ignore=shutil.ignore_patterns("packed", "dense", "mlx", "gguf", "bitnet.json")
    )
    code = "import os\nos.mkdir({!r})\nfrom .parts_mine import Part\nclass Mine: pass\n"
    (latents / "modeling_mine.py").write_text(code.format(str(tmp_path / "it ran")))
    (latents / "parts_mine.py").write_text("class Part: pass\n")
    (latents / "train.py").write_text("# not the model's\n")
    names = {
        "AutoConfig": "modeling_mine.Mine",
        "AutoModelForCausalLM": "modeling_mine.Mine",
        "Auto1": "../../outside.Mine",
        "Auto2": "someone/else--modeling_theirs.Mine",
        "Auto3": "missing.Mine",
    }
    edit_config(
        latents, lambda config: config.update(auto_map=names, model_type="mine", architectures=["Mine"])
    )
    for name in ("packed", "dense", "mlx"):
        target = export(name, latents, tmp_path / name)
        assert sorted(path.name for path in target.glob("*.py")) == ["modeling_mine.py", "parts_mine.py"]
        report = verify_checkpoint(target, latents, PROMPTS)
        assert report.ok and report.checks[-1].detail == "not run: the model needs code of its own"
    export("packed", latents, tmp_path / "packed", overwrite=True)
    (tmp_path / "packed" / "modeling_mine.py").write_text("from .parts_mine import Part\n")
    assert verify_checkpoint(tmp_path / "packed", latents).mismatches == ["modeling_mine.py differs"]
    assert not (tmp_path / "it ran").exists()
