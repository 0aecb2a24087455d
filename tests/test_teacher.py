"""A teacher beside a model of transformers: what the loss is of, what stays the model's own, and FSDP2."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("transformers")

from axolotl_bitnet import convert_to_bitlinear
from axolotl_bitnet.training.ramp import fully_ternary, set_ramp
from axolotl_bitnet.training.teacher import Teacher, TeacherError, Teaching, refuse_other_heads, teach
from support.sharded import WORLD, in_ranks

Build = Callable[..., nn.Module]
VOCABULARY = 128


def couple(tiny_model: Build, family: str = "Llama", **overrides: Any) -> tuple[Any, Any]:
    """A dense model that knows something, and its ternary copy."""
    torch.manual_seed(11)
    dense = tiny_model(family, vocab_size=VOCABULARY, **overrides)
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.dim() == 2:
                parameter *= 5
    student = copy.deepcopy(dense)
    convert_to_bitlinear(student)
    return dense, student.train()


def batch(rows: int = 3, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100  # a prompt
    mask = torch.ones_like(ids)
    labels[1:2, 8:] = -100  # padding
    mask[1:2, 8:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def expected(dense: Any, student: Any, inputs: dict[str, Tensor], weight: float = 1.0) -> Tensor:
    """From whole logits: mean over the trained tokens, the label being the next token."""
    given = {key: value for key, value in inputs.items() if key != "labels"}
    with torch.no_grad():
        log_p = dense(**given).logits[:, :-1].log_softmax(-1)
    log_q = student(**given).logits[:, :-1].log_softmax(-1)
    labels = inputs["labels"][:, 1:]
    kept = labels != -100
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[kept].mean()
    ce = nn.functional.nll_loss(log_q[kept], labels[kept])
    return weight * kl + (1 - weight) * ce


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_loss_and_gradients_are_those_of_whole_logits(tiny_model: Build, tied: bool, weight: float) -> None:
    dense, student = couple(tiny_model, tie_word_embeddings=tied)
    inputs = batch()
    want = expected(dense, student, inputs, weight)
    want.backward()
    exact = gradients(student)
    teach(student, Teacher(copy.deepcopy(dense), weight=weight))
    loss = student(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, want)
    close(gradients(student), exact)


@pytest.mark.parametrize("family", ["Qwen3", "Mistral", "Gemma", "Olmo2"])
def test_other_architectures(tiny_model: Build, family: str) -> None:
    dense, student = couple(tiny_model, family)
    refuse_other_heads(dense)
    want = expected(dense, student, batch())
    teach(student, Teacher(dense))
    torch.testing.assert_close(student(**batch()).loss, want)


def test_packed_samples_do_not_see_each_other(tiny_model: Build) -> None:
    """By position ids, for the teacher as for the student."""
    dense, student = couple(tiny_model, attn_implementation="sdpa")
    parts = [batch(1, 7, seed=1), batch(1, 5, seed=2)]
    for part in parts:
        del part["attention_mask"]
        part["labels"][:, 0] = -100  # nothing is learned across the border
    packed = {key: torch.cat([part[key] for part in parts], 1) for key in parts[0]}
    packed["position_ids"] = torch.cat([torch.arange(7), torch.arange(5)])[None]
    tokens = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
    want = sum(n * expected(dense, student, part) for n, part in zip(tokens, parts, strict=True)) / sum(
        tokens
    )
    teach(student, Teacher(dense))
    torch.testing.assert_close(student(**packed).loss, want)


def test_micro_batches_add_up_to_the_batch(tiny_model: Build) -> None:
    dense, student = couple(tiny_model)
    teach(student, Teacher(dense))
    whole = batch(4)
    items = (whole["labels"][:, 1:] != -100).sum()
    student(**whole).loss.backward()
    exact = gradients(student)
    for rows in (slice(0, 1), slice(1, 4)):
        part = {key: value[rows] for key, value in whole.items()}
        student(**part, num_items_in_batch=items).loss.backward()
    close(gradients(student), exact)


def test_a_batch_without_labels_to_learn_has_zero_gradients(tiny_model: Build) -> None:
    dense, student = couple(tiny_model)
    teach(student, Teacher(dense))
    inputs = batch()
    inputs["labels"][:] = -100
    loss = student(**inputs).loss
    loss.backward()
    assert loss.item() == 0 and not any(g.any() for g in gradients(student).values())


def test_evaluation_and_generation_stay_the_models_own(tiny_model: Build) -> None:
    dense, student = couple(tiny_model)
    plain = copy.deepcopy(student).eval()
    teacher = Teacher(copy.deepcopy(dense))
    teach(student, teacher)
    student.eval()
    inputs = batch()
    with torch.no_grad():
        assert torch.equal(student(**inputs).loss, plain(**inputs).loss)
        assert torch.equal(student(inputs["input_ids"]).logits, plain(inputs["input_ids"]).logits)
        teacher.answering = True
        answer = student(**inputs)
        assert torch.equal(answer.loss, dense.eval()(**inputs).loss)
        assert answer.past_key_values is None  # a cache would be another graph for every compiled layer


def test_the_teacher_is_in_no_checkpoint(tiny_model: Build, tmp_path: Path) -> None:
    dense, student = couple(tiny_model)
    keys = set(student.state_dict())
    teach(student, Teacher(dense))
    assert set(student.state_dict()) == keys and not any(p.requires_grad for p in dense.parameters())
    assert len(list(student.modules())) < 2 * len(list(dense.modules()))
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_a_patched_class_is_passed_by(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger and cut cross-entropy replace the class's forward by one without logits."""
    dense, student = couple(tiny_model)
    want = expected(dense, student, batch())

    def patched(self: Any, **kwargs: Any) -> Any:
        assert not self.training
        return SimpleNamespace(loss="theirs")

    teach(student, Teacher(dense))
    monkeypatch.setattr(type(dense).__mro__[1], "forward", patched)
    torch.testing.assert_close(student(**batch()).loss, want)
    assert student.eval()(**batch()).loss == "theirs"


def test_a_replaced_forward_of_the_model_itself_is_refused_or_noticed(tiny_model: Build) -> None:
    dense, student = couple(tiny_model)
    teacher = Teacher(dense)
    original = student.forward
    student.forward = original
    with pytest.raises(TeacherError, match="replaced by another tool"):
        teach(student, teacher)
    del student.forward
    teach(student, teacher)
    student.forward = original
    student(**batch())
    with pytest.raises(RuntimeError, match="without the teacher's loss"):
        teacher.logs()


def test_kl_is_logged_as_the_mean_since_the_last_time(tiny_model: Build) -> None:
    dense, student = couple(tiny_model)
    want = float(expected(dense, student, batch()))
    teacher = Teacher(dense, temperature=2.0)
    teach(student, teacher)
    for _ in range(2):
        student(**batch())
    assert teacher.logs()["bitnet/kl"] != pytest.approx(want)  # at its temperature
    teacher.temperature = 1.0
    student(**batch())
    assert teacher.logs() == {"bitnet/kl": pytest.approx(want, rel=1e-5)} and teacher.logs() == {}


@pytest.mark.parametrize(
    "family, keys",
    [
        ("Gemma2", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}),
    ],
)
def test_logits_that_are_more_than_a_product_are_refused(
    tiny_model: Build, family: str, keys: dict[str, Any]
) -> None:
    dense, _ = couple(tiny_model, family, **keys)
    with pytest.raises(TeacherError, match="a bias, a cap or a factor"):
        refuse_other_heads(dense)


def test_another_vocabulary_is_refused(tiny_model: Build) -> None:
    _, student = couple(tiny_model)
    with pytest.raises(TeacherError, match="head has 64 words and the model's 128"):
        teach(student, Teacher(tiny_model("Llama", vocab_size=64)))


def test_a_ramp_and_gradient_checkpointing(tiny_model: Build) -> None:
    dense, student = couple(tiny_model)
    set_ramp(student, 0.5)
    want = expected(dense, student, batch())
    want.backward()
    exact = gradients(student)
    teach(student, Teacher(dense))
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = student(**batch()).loss
    loss.backward()
    torch.testing.assert_close(loss, want)
    close(gradients(student), exact)
    with fully_ternary(student), torch.no_grad():
        assert float(student(**batch()).loss) != pytest.approx(float(want))


@pytest.mark.slow
def test_under_torch_compile(tiny_model: Build) -> None:
    dense, student = couple(tiny_model)
    teacher = Teacher(dense)
    teach(student, teacher)
    student(**batch()).loss.backward()
    exact, kl = gradients(student), teacher.logs()
    compiled = torch.compile(student, backend="aot_eager")
    for _ in range(2):
        compiled(**batch()).loss.backward()
        close(gradients(student), exact)
    assert teacher.logs()["bitnet/kl"] == pytest.approx(kl["bitnet/kl"], rel=1e-5)


def test_data_parallel_is_refused(tiny_model: Build) -> None:
    dense, student = couple(tiny_model)
    with pytest.raises(TeacherError, match="DataParallel"):
        Teaching(Teacher(dense)).on_train_begin(SimpleNamespace(n_gpu=2), None, None, model=student)


# Ranks

STEPS = 3
CASES = [("ddp", False), ("fsdp2", False), ("fsdp2", True)]


def trained(
    tiny_model: Build, wrap: Callable[[Any], Any], rows: Callable[[dict[str, Tensor]], Any]
) -> dict[str, Any]:
    """A few steps on batches whose rows are shared out; what the unsharded run does on all of them."""
    dense, student = couple(tiny_model, tie_word_embeddings=True)
    dense.float()
    teacher = Teacher(dense)
    teach(student, teacher)
    model = wrap(student)
    Teaching(teacher).on_train_begin(SimpleNamespace(n_gpu=1, device="cpu"), None, None, model=model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen: dict[str, Any] = {"kl": []}
    for step in range(STEPS):
        inputs = batch(4, seed=step)
        items = (inputs["labels"][:, 1:] != -100).sum()
        scale = dist.get_world_size() if dist.is_initialized() else 1  # gradients are averaged over ranks
        (model(**rows(inputs), num_items_in_batch=items).loss * scale).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen["kl"].append(teacher.logs()["bitnet/kl"])
    seen["sharded"] = hasattr(dense, "reshard")
    seen["weights"] = {
        name.removeprefix("module."): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
        for name, p in model.named_parameters()
    }
    return seen


def worker(rank: int, folder: str, build: Build) -> None:
    from torch.distributed.fsdp import fully_shard

    def wrapping(kind: str, checkpointed: bool) -> Callable[[Any], Any]:
        def wrap(model: Any) -> Any:
            if checkpointed:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if kind == "ddp":
                return nn.parallel.DistributedDataParallel(model)
            for layer in model.model.layers:
                fully_shard(layer)
            return fully_shard(model)

        return wrap

    part = slice(rank * 2, rank * 2 + 2)
    seen = [
        trained(build, wrapping(*case), lambda inputs: {key: value[part] for key, value in inputs.items()})
        for case in CASES
    ]
    torch.save(seen, Path(folder) / f"{rank}.pt")


def _build(family: str, **overrides: Any) -> nn.Module:
    """The fixture ``tiny_model`` for other processes."""
    import transformers

    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }
    config = getattr(transformers, f"{family}Config")(**settings | overrides)
    return getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("teacher")
    in_ranks(worker, str(folder), _build)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(CASES)), ids=str)
def test_ranks_train_what_one_process_trains(ranks: list[list[dict[str, Any]]], index: int) -> None:
    alone = trained(_build, lambda model: model, lambda inputs: inputs)
    assert len(set(alone["kl"])) == STEPS
    for rank in range(WORLD):
        seen = ranks[rank][index]
        assert seen["sharded"] == (CASES[index][0] == "fsdp2")
        assert seen["kl"] == pytest.approx(alone["kl"], rel=1e-3)
        assert seen["weights"].keys() == alone["weights"].keys()
        for name, weight in seen["weights"].items():
            torch.testing.assert_close(weight, alone["weights"][name], rtol=1e-3, atol=1e-3)
