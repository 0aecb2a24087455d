"""What reaches the hub, with a stand-in for its API: nothing here can reach the network."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl.cli")

from click.testing import CliRunner
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoTokenizer

from axolotl_bitnet.cli.main import main
from axolotl_bitnet.formats.registry import FORMATS
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.model.fingerprint import Fingerprint, fingerprint_model
from axolotl_bitnet.plugin import hub
from axolotl_bitnet.plugin import plugin as plugin_module
from axolotl_bitnet.plugin.args import BitNetConfig
from axolotl_bitnet.plugin.card import write_card
from axolotl_bitnet.plugin.finish import export_run
from axolotl_bitnet.verify.verify import VerificationError, verify_checkpoint
from support import TINY
from support.runs import config, train
from support.zoo import MADE, make_run

Files = dict[str, bytes]


class Hub:
    """One repository: its files after each commit, filtered as huggingface_hub filters them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.commits: list[tuple[str, Files]] = []
        self.files: Files = {}
        self.broken = False
        monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="someone/model"))
        monkeypatch.setattr(HfApi, "upload_folder", lambda _, **keys: self.upload(**keys))

    def upload(
        self,
        repo_id: str,
        folder_path: str | Path,
        commit_message: str = "",
        token: str | None = None,
        revision: str | None = None,
        run_as_future: bool = False,
        **patterns: Any,
    ) -> Any:
        assert repo_id == "someone/model" and "path_in_repo" not in patterns
        if self.broken:
            raise ConnectionError("no hub today")
        folder = Path(folder_path)
        found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        allow, ignore = patterns.get("allow_patterns"), patterns.get("ignore_patterns")
        kept = filter_repo_objects(found, allow_patterns=allow, ignore_patterns=ignore)
        if delete := patterns.get("delete_patterns"):
            for name in list(filter_repo_objects(list(self.files), allow_patterns=delete)):
                del self.files[name]
        self.files |= {name: (folder / name).read_bytes() for name in kept}
        self.commits.append((commit_message, dict(self.files)))
        if run_as_future:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        return None


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., torch.nn.Module]) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    tiny_model("Llama", vocab_size=-(-len(tokenizer) // 32) * 32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _pushing(folder: Path, base: Path, **overrides: Any) -> dict[str, Any]:
    keys = {"hub_model_id": "model", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    return config(folder, base, **(keys | overrides))


def _packed(files: Files) -> Files:
    return {name: data for name, data in files.items() if name.startswith("packed/")}


def _download(files: Files, folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.slow
def test_the_packed_model_reaches_the_hub_whole_and_alone(
    repository: Hub, base: Path, tmp_path: Path
) -> None:
    """Two runs into one folder and one repository: no commit holds another run's packed model as its own."""
    train(_pushing(tmp_path, base, bitnet={"export": ["packed", "dense"]}))
    first = repository.commits[-1][1]
    assert _packed(first) and "bitnet.json" in first and "dense/model.safetensors" in first
    card = first["README.md"].decode()
    assert "built with axolotl" in card.lower() and card.count("## Ternary (1.58-bit) weights") == 1
    assert "hf download someone/model --include 'packed/*' --include 'dense/*' --local-dir model" in card
    assert 'from_pretrained("model/packed"' in card and "vllm serve model/dense" in card
    assert verify_checkpoint(_download(first, tmp_path / "first") / "packed", tmp_path / "first").ok
    assert [bool(_packed(files)) for _, files in repository.commits].count(True) == 1  # one commit, the last

    repository.files["packed/stray.safetensors"] = b"of an older version"
    seen = len(repository.commits)
    train(_pushing(tmp_path, base, max_steps=3))
    second = repository.commits[-1][1]
    assert "packed/stray.safetensors" not in second and "model.safetensors" in second
    assert not any(name.startswith("dense/") for name in second)  # the earlier run's, not asked for again
    card = second["README.md"].decode()
    assert card.count("## Ternary (1.58-bit) weights") == 1 and "model/dense" not in card
    assert second["bitnet.json"] != first["bitnet.json"]
    assert verify_checkpoint(_download(second, tmp_path / "second") / "packed", tmp_path / "second").ok
    out = tmp_path / "out"
    assert {name: (out / name).read_bytes() for name in _packed(second)} == _packed(second)
    assert (out / "model.safetensors").read_bytes() == second["model.safetensors"]
    for _, files in repository.commits[seen:-1]:  # what lay there, untouched until the last commit
        assert {name: data for name, data in _packed(files).items() if "stray" not in name} == _packed(first)
    assert not any(name.startswith("_") for name in second)


@pytest.mark.slow
def test_pushes_in_the_course_of_training_hold_no_earlier_artifacts(
    repository: Hub, base: Path, tmp_path: Path
) -> None:
    stale = tmp_path / "out" / "packed" / "model.safetensors"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"an earlier run's")
    (tmp_path / "out" / "bitnet.json").write_text('{"artifacts": {"packed": {"path": "packed"}}}')
    train(_pushing(tmp_path, base))
    *before, (_, last) = repository.commits
    assert before and not any(_packed(files) or "bitnet.json" in files for _, files in before)
    assert last["packed/model.safetensors"] != b"an earlier run's"


@pytest.mark.slow
def test_a_run_that_fails_its_proof_leaves_no_packed_model_on_the_hub(
    repository: Hub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.files |= {"packed/model.safetensors": b"an earlier run's", "README.md": b"words"}
    monkeypatch.setattr(plugin_module, "fingerprint_model", lambda _: Fingerprint({}))
    with pytest.raises(VerificationError):
        train(_pushing(tmp_path, base, max_steps=1))
    assert not _packed(repository.files)
    assert "README.md" in repository.files and "model.safetensors" in repository.files


@pytest.mark.slow
def test_a_run_that_does_not_push_reaches_no_hub(repository: Hub, base: Path, tmp_path: Path) -> None:
    train(config(tmp_path, base, max_steps=1))
    assert repository.commits == [] and (tmp_path / "out" / "packed").is_dir()


# The model card


@pytest.mark.slow
def test_the_card_s_commands_are_right(
    tmp_path: Path, tiny_model: Callable[..., torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Python is run, and its proofs."""
    run = make_run(tiny_model, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    write_card("out", MADE, None)
    card = (run / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
        ids = names["tokenizer"]("one", return_tensors="pt").input_ids
        with torch.compiler.set_stance("force_eager"):
            assert bool(names["model"](ids).logits.isfinite().all())
    lines = re.findall(r"^axolotl-bitnet (verify .*)$", card, re.MULTILINE)
    assert len(lines) == len(MADE)
    for line in lines:
        result = CliRunner().invoke(main, [*line.split(), "--no-run"])
        assert result.exit_code == 0, result.output
    for name in MADE:
        assert f"out/{FORMATS[name].path}" in card


def test_the_card_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    write_card(tmp_path, [], None)
    assert not path.exists()
    path.write_text("---\ntags:\n- mine\nlicense: mit\n---\n\n# My model\n\nWords, and more.\n")
    write_card(tmp_path, ["packed"], None)
    once = path.read_text()
    card = ModelCard(once)
    assert card.data.tags == ["mine", "bitnet", "ternary", "1.58-bit"] and card.data.license == "mit"
    assert "# My model\n\nWords, and more." in once and once.count("## Ternary") == 1
    write_card(tmp_path, ["packed"], None)
    assert path.read_text() == once
    write_card(tmp_path, ["dense", "mlx"], "someone/model")
    other = path.read_text()
    assert "Words, and more." in other and other.count("## Ternary") == 1 and "packed" not in other
    write_card(tmp_path, [], None)  # a run that could make none
    assert "Words, and more." in path.read_text() and "## Ternary" not in path.read_text()


def test_a_card_that_cannot_be_written_costs_nothing(
    tmp_path: Path, tiny_model: Callable[..., torch.nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("Llama", num_hidden_layers=1)
    convert_to_bitlinear(model)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    (tmp_path / "README.md").mkdir()
    with caplog.at_level(logging.WARNING, logger=hub.LOG.name):
        export_run(tmp_path, fingerprint_model(model), BitNetConfig(), None)
    assert any("model card" in record.getMessage() for record in caplog.records)
    assert verify_checkpoint(tmp_path / "packed", tmp_path).ok


def test_a_push_that_fails_says_how_to_do_it_again(
    repository: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    repository.broken = True
    target = hub.Repository("someone/model", "dev", None)
    with (
        caplog.at_level(logging.ERROR, logger=hub.LOG.name),
        pytest.raises(ConnectionError),
        hub.published(tmp_path, target),
    ):
        pass
    (line,) = [record.getMessage() for record in caplog.records if record.name == hub.LOG.name]
    assert f"hf upload someone/model {tmp_path} . --revision dev --include 'packed/*'" in line
    with pytest.raises(VerificationError), hub.published(tmp_path, target):  # not hidden by the hub's own
        raise VerificationError("codes differ")
    with hub.published(tmp_path, None):
        pass
