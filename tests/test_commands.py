"""Axolotl's other commands with a ternary config: right, or refused with what to run instead."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("axolotl.cli")

from click.testing import CliRunner, Result
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_bitnet.formats.export import pack_checkpoint
from axolotl_bitnet.formats.latent import LatentCheckpoint
from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.plugin.refusals import refusals
from axolotl_bitnet.plugin.refusals.commands import command_refusals
from axolotl_bitnet.storage.atomic import CheckpointError
from axolotl_bitnet.verify.verify import verify_checkpoint
from support import TINY
from support.runs import Run, config, data_saved_in_this_process, preference, train

Trained = tuple[Path, dict[str, Any], Run]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., torch.nn.Module]) -> Trained:
    """A folder, its config and the run it holds, with an evaluation at the end."""
    folder = tmp_path_factory.mktemp("commands")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    tiny_model("Llama", vocab_size=-(-len(tokenizer) // 32) * 32).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    settings = config(folder, folder / "base", val_set_size=0.1, eval_strategy="steps", eval_steps=3)
    return folder, settings, train(settings)


def _axolotl(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    command: str,
    settings: dict[str, Any],
    *rest: str,
    **keys: Any,
) -> Result:
    from axolotl.cli.main import cli

    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(sys, "argv", ["axolotl"])  # which Axolotl reads beside what click passes on
    with data_saved_in_this_process():
        return CliRunner().invoke(cli, [command, str(path), *rest], **keys)


def _on(trained: Trained, tmp_path: Path, **overrides: Any) -> dict[str, Any]:
    """The config of a command on the trained model."""
    folder, settings, _ = trained
    return settings | {"base_model": str(folder / "out"), "output_dir": str(tmp_path / "out")} | overrides


@pytest.mark.slow
def test_evaluate_scores_the_ternary_model(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _on(trained, tmp_path)
    result = _axolotl(monkeypatch, tmp_path, "evaluate", settings, "--launcher", "python")
    assert result.exit_code == 0, result.exception
    rows = (tmp_path / "out" / "eval_summary.csv").read_text().splitlines()
    (loss,) = [float(row.split(",")[2]) for row in rows if row.startswith("loss,")]
    run = trained[2]
    assert loss == run.logged("eval_loss")[-1]
    state = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    dense = AutoModelForCausalLM.from_pretrained(trained[0] / "out", dtype=torch.float32)
    assert all(torch.equal(tensor, state[name]) for name, tensor in dense.state_dict().items())
    run.trainer.model = dense  # the latents as they are: what a command without the plugin would score
    try:
        assert run.trainer.evaluate()["eval_loss"] != pytest.approx(loss, rel=1e-4)
    finally:
        run.trainer.model = run.model


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "ipo"])
def test_evaluate_refuses_a_dense_reference(
    method: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = preference(tmp_path, trained[0] / "out", rl=method)
    result = _axolotl(monkeypatch, tmp_path, "evaluate", settings, "--launcher", "python")
    assert result.exit_code != 0 and "a config without `rl`" in str(result.exception)


@pytest.mark.slow
def test_inference_generates_what_the_packed_model_does(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from axolotl.cli import inference

    made = []

    def short(**settings: Any) -> Any:
        made.append(original(**(settings | {"max_new_tokens": 12})))
        return made[-1]

    original = inference.GenerationConfig
    monkeypatch.setattr(inference, "GenerationConfig", short)
    load = inference.load_model_and_tokenizer

    def rounded(**arguments: Any) -> Any:
        """A packed folder holds all but the ternary layers in bfloat16."""
        model, *rest = load(**arguments)
        ternary = {id(module.weight) for module in model.modules() if isinstance(module, BitLinear)}
        assert len(ternary) == 14
        for parameter in model.parameters():
            assert parameter.dtype == torch.float32
            if id(parameter) not in ternary:
                parameter.data = parameter.data.bfloat16().float()
        torch.manual_seed(5)
        return model, *rest

    monkeypatch.setattr(inference, "load_model_and_tokenizer", rounded)
    result = _axolotl(
        monkeypatch,
        tmp_path,
        "inference",
        _on(trained, tmp_path),
        "--launcher",
        "python",
        input="Who are you?",
    )
    assert result.exit_code == 0, result.exception

    packed = trained[0] / "out" / "packed"
    tokenizer = AutoTokenizer.from_pretrained(packed)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    for folder, same in ((packed, True), (trained[0] / "out", False)):
        with torch.compiler.set_stance("force_eager"):
            torch.manual_seed(5)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            sequence = model.generate(prompt, generation_config=made[0])["sequences"][0]
        assert len(sequence) > prompt.shape[1] + 1
        assert (tokenizer.decode(sequence) in result.output) is same


@pytest.mark.slow
def test_preprocess_does_not_depend_on_the_flag(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = []
    for flag in (True, None):
        folder = tmp_path / str(flag)
        settings = trained[1] | {"use_onebitllms": flag, "dataset_prepared_path": str(folder)}
        result = _axolotl(monkeypatch, tmp_path, "preprocess", settings)
        assert result.exit_code == 0, result.exception
        prepared.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.arrow")})
    assert prepared[0] and prepared[0] == prepared[1]
    used = {path.relative_to(trained[0] / "prepared") for path in (trained[0] / "prepared").rglob("*.arrow")}
    assert set(prepared[0]) <= used  # what training looks for


@pytest.mark.slow
def test_merged_shards_pack_to_the_same_folder(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge is in bfloat16: latents lose low bits, codes and scales nothing."""
    import torch.distributed.checkpoint as dcp

    folder, settings, run = trained
    out = tmp_path / "out"
    run.model.config.save_pretrained(out)  # as Axolotl does before it trains
    run.trainer.processing_class.save_pretrained(out)
    shards = out / "checkpoint-3" / "pytorch_model_fsdp_0"
    dcp.save({"model": run.model.state_dict()}, checkpoint_id=shards)
    result = _axolotl(
        monkeypatch,
        tmp_path,
        "merge-sharded-fsdp-weights",
        settings | {"output_dir": str(out)},
        "--launcher",
        "python",
    )
    assert result.exit_code == 0, result.exception
    weights = load_file(out / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    pack_checkpoint(out / "merged", out / "packed")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        ours, theirs = (root / "packed" / name for root in (out, folder / "out"))
        if name == "model.safetensors":
            ours, theirs = load_file(ours), load_file(theirs)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
        else:
            assert ours.read_bytes() == theirs.read_bytes()
    assert verify_checkpoint(out / "packed", LatentCheckpoint(folder / "out").fingerprint()).ok
    (out / "merged").rename(out / "elsewhere")
    with pytest.raises(CheckpointError, match=r"elsewhere.config\.json"):
        pack_checkpoint(out / "elsewhere", tmp_path / "packed")


@pytest.mark.slow
def test_lm_eval_is_pointed_at_the_packed_model(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, settings, _ = trained
    settings = settings | {"lm_eval_tasks": ["arc_easy"], "lm_eval_batch_size": 2}
    (problem,) = refusals(settings)
    assert problem.endswith(f"Add `lm_eval_model: {folder / 'out' / 'packed'}`")
    for wrong in (settings["output_dir"], "me/model"):
        assert len(refusals(settings | {"lm_eval_model": wrong, "hub_model_id": "me/model"})) == 1

    settings["lm_eval_model"] = str(folder / "out" / "packed")
    assert refusals(settings) == []
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    result = _axolotl(monkeypatch, tmp_path, "lm-eval", settings | {"bf16": True})
    assert result.exit_code == 0, result.exception
    ((*_,),) = commands
    options = dict(zip(commands[0][1::2], commands[0][2::2], strict=True))
    assert options["--model"] == "hf"
    assert options["--model_args"] == f"pretrained={folder / 'out' / 'packed'},dtype=bfloat16"


@pytest.mark.slow
def test_lm_evals_backend_scores_the_packed_model_right(trained: Trained) -> None:
    harness = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    folder, _, run = trained
    with torch.compiler.set_stance("force_eager"):
        backend = harness.HFLM(
            pretrained=str(folder / "out" / "packed"), dtype="float32", device="cpu", batch_size=1
        )
        pairs = [("Who are", " you?"), ("In the beginning", " was the word")]
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        scores = [score for score, _ in backend.loglikelihood(requests, disable_tqdm=True)]
    ternary = {id(module.weight) for module in run.model.modules() if isinstance(module, BitLinear)}
    before = {name: parameter.data for name, parameter in run.model.named_parameters()}
    run.model.eval()
    for parameter in run.model.parameters():
        if id(parameter) not in ternary:
            parameter.data = parameter.data.bfloat16().float()
    try:
        for (context, continuation), score in zip(pairs, scores, strict=True):
            start, end = backend._encode_pair(context, continuation)
            with torch.no_grad():
                logits = run.model(torch.tensor([(start + end)[:-1]])).logits[0].log_softmax(-1)
            expected = logits[-len(end) :].gather(1, torch.tensor(end)[:, None]).sum()
            assert score == pytest.approx(expected.item(), abs=1e-5)
    finally:
        for name, parameter in run.model.named_parameters():
            parameter.data = before[name]


EXPORT = pytest.mark.skipif(Version(version("axolotl")) < Version("0.21"), reason="new in Axolotl 0.21")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, extra, reason",
    [
        ("quantize", {}, "quantize the dense latents"),
        ("quantize", {"quantization": {"weight_dtype": "int8"}}, "quantize the dense latents"),
        ("merge-lora", {}, "no adapter to merge"),
        ("vllm-serve", {"vllm": {"host": "localhost"}}, "serve the base's latents as a dense"),
        pytest.param("export", {}, "convert the latents as a dense", marks=EXPORT),
    ],
)
def test_what_would_take_the_latents_for_a_model_is_refused(
    command: str,
    extra: dict[str, Any],
    reason: str,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = trained[1] | extra
    result = _axolotl(monkeypatch, tmp_path, command, settings)
    said = str(result.exception)
    assert result.exit_code != 0
    assert said.count(f"`axolotl {command}` with `use_onebitllms`") == 1 and reason in said
    out = trained[0] / "out"
    assert f"`axolotl-bitnet pack {out} {out / 'packed'}`" in said


def test_a_server_of_rollouts_is_not_refused() -> None:
    """It starts with the base's latents, and gets what is trained before the first rollout."""
    with click.Context(click.Command("vllm-serve"), info_name="vllm-serve"):
        assert len(command_refusals({"use_onebitllms": True})) == 1
        assert command_refusals({"use_onebitllms": True, "rl": "grpo", "trl": {"use_vllm": True}}) == []


def test_from_python_a_commands_own_keys_tell_it() -> None:
    for key, command in (("quantization", "quantize"), ("merge_lora", "merge-lora")):
        (problem,) = refusals({"use_onebitllms": True, key: {"x": 1}})
        assert f"`axolotl {command}`" in problem
