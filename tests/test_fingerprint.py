"""The fingerprint notices every change of a code or a scale, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.model import fingerprint as module
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.model.fingerprint import (
    Fingerprint,
    TensorFingerprint,
    clean_name,
    digest_rows,
    fingerprint_codes,
    fingerprint_model,
    merge_digests,
)
from axolotl_bitnet.ternary import DEFINITION, latents_of, ternarize

SCALE = torch.tensor([37.25], dtype=torch.bfloat16)


def random_codes(rows: int, columns: int) -> Tensor:
    return torch.randint(-1, 2, (rows, columns), dtype=torch.int8)


def stack() -> nn.Sequential:
    return nn.Sequential(BitLinear(24, 36), nn.ReLU(), BitLinear(36, 20, bias=False), nn.Linear(20, 8))


# The digest of a matrix


def reference_digest(codes: np.ndarray) -> int:
    """In Python integers, from the description: splitmix64's finalizer, seeds 1 (columns) and 2 (rows)."""

    def odd(index: int, seed: int) -> int:
        z = ((index + 1) * 0x9E3779B97F4A7C15 + seed * 0xD1342543DE82EF95) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return (z ^ z >> 31) | 1

    total = 0
    for (row, column), code in np.ndenumerate(codes):
        total += int(code) * odd(row, 2) * odd(column, 1)
    return total % 2**64


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 40), (64, 9)])
def test_digest_is_the_sum_it_says(shape: tuple[int, int]) -> None:
    codes = random_codes(*shape)
    assert digest_rows(codes) == reference_digest(codes.numpy())
    assert fingerprint_codes(codes, SCALE).codes == f"{reference_digest(codes.numpy()):016x}"


def test_digest_never_changes() -> None:
    """Fingerprints are kept in files for years: these bits may only change with DEFINITION."""
    codes = (torch.arange(60).reshape(6, 10) * 7 % 3 - 1).to(torch.int8)
    assert DEFINITION == 1
    assert fingerprint_codes(codes, SCALE) == TensorFingerprint((6, 10), "f86259c775c42f04", 37.25, 20)
    whole = Fingerprint({"a": fingerprint_codes(codes, SCALE)})
    assert whole.digest == "e503fbd19623179911054e0475e20ef53a3327a6b079a7633a0cdb2d72282da9"


@pytest.mark.parametrize("shape", [(4, 4), (37, 53), (128, 96)])
def test_one_flipped_code_is_found(shape: tuple[int, int]) -> None:
    codes = random_codes(*shape)
    original = digest_rows(codes)
    seen = {original}
    for _ in range(300):
        row, column = int(torch.randint(shape[0], ())), int(torch.randint(shape[1], ()))
        changed = codes.clone()
        changed[row, column] = (
            codes[row, column] + torch.randint(1, 3, ()) + 1
        ) % 3 - 1  # one of the other two
        assert changed[row, column] != codes[row, column] and changed.abs().max() <= 1
        assert digest_rows(changed) != original
        seen.add(digest_rows(changed))
    assert len(seen) > min(200, codes.numel())  # different changes look different


def test_every_single_flip_of_a_small_matrix_is_found() -> None:
    codes = random_codes(7, 9)
    digests = [digest_rows(codes)]
    for position in range(codes.numel()):
        for other in {-1, 0, 1} - {int(codes.view(-1)[position])}:
            changed = codes.clone()
            changed.view(-1)[position] = other
            digests.append(digest_rows(changed))
    assert len(set(digests)) == 1 + 2 * codes.numel()


def test_swaps_are_found() -> None:
    codes = random_codes(40, 56)
    assert len(codes.unique(dim=0)) == 40 and len(codes.unique(dim=1).t()) == 56
    original = digest_rows(codes)
    for size, dim in ((40, 0), (56, 1)):
        for _ in range(50):
            order = torch.arange(size)
            first, second = torch.randperm(size)[:2].tolist()
            order[first], order[second] = second, first
            assert digest_rows(codes.index_select(dim, order)) != original
        for shift in range(1, size):
            assert digest_rows(codes.roll(shift, dim)) != original
        assert digest_rows(codes.flip(dim)) != original
    assert digest_rows(-codes) != original
    square = random_codes(24, 24)
    assert digest_rows(square) != digest_rows(square.t())


def test_two_codes_exchanged_are_found() -> None:
    codes = random_codes(16, 16)
    flat = codes.view(-1)
    for _ in range(200):
        first, second = torch.randperm(256)[:2]
        if flat[first] != flat[second]:
            changed = codes.clone()
            changed.view(-1)[first], changed.view(-1)[second] = flat[second], flat[first]
            assert digest_rows(changed) != digest_rows(codes)


def test_shape_is_part_of_it() -> None:
    codes = random_codes(6, 8)
    padded = torch.cat([codes, torch.zeros(2, 8, dtype=torch.int8)])
    assert digest_rows(padded) == digest_rows(codes)  # zeros weigh nothing in the sum
    assert fingerprint_codes(padded, SCALE) != fingerprint_codes(codes, SCALE)
    assert fingerprint_codes(codes.reshape(8, 6), SCALE) != fingerprint_codes(codes, SCALE)


@pytest.mark.parametrize("pieces", [2, 3, 7, 40])
def test_blocks_of_rows_merge(pieces: int) -> None:
    codes = random_codes(37, 29)
    digests, first = [], 0
    for block in codes.chunk(pieces):
        digests.append(digest_rows(block, first))
        first += len(block)
    assert first == 37
    assert merge_digests(digests) == merge_digests(digests[::-1]) == digest_rows(codes)
    misplaced = [digest_rows(block) for block in codes.chunk(pieces)]  # every block as if it began the matrix
    assert merge_digests(misplaced) != digest_rows(codes)


@pytest.mark.parametrize("block", [1, 29, 30, 100, 10**6])
def test_digest_does_not_depend_on_its_own_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    codes = random_codes(37, 29)
    expected = reference_digest(codes.numpy())
    monkeypatch.setattr(module, "_BLOCK", block)
    assert digest_rows(codes) == expected


def test_layout_in_memory_does_not_matter() -> None:
    codes = random_codes(30, 50)
    assert digest_rows(codes.t().contiguous().t()) == digest_rows(codes)
    assert digest_rows(random_codes(0, 8)) == 0


def test_zeros_and_scale_are_told() -> None:
    codes = random_codes(12, 12)
    found = fingerprint_codes(codes, SCALE)
    assert found.shape == (12, 12) and found.scale == 37.25
    assert found.zeros == int((codes == 0).sum())


def test_the_smallest_change_of_scale_is_found() -> None:
    codes = random_codes(12, 12)
    up = torch.nextafter(SCALE, torch.full_like(SCALE, torch.inf))
    one, other = (Fingerprint({"a": fingerprint_codes(codes, scale)}) for scale in (SCALE, up))
    assert one != other and one.digest != other.digest


# A model's


def test_model_has_one_entry_a_ternary_layer() -> None:
    model = stack()
    found = fingerprint_model(model)
    assert list(found.tensors) == ["0", "2"] and found.definition == DEFINITION
    for name, entry in found.tensors.items():
        assert entry == fingerprint_codes(*ternarize(model.get_submodule(name).weight.detach()))


def test_only_codes_and_scales_count() -> None:
    model = stack()
    before = fingerprint_model(model)
    with torch.no_grad():
        model[0].bias.add_(1)
        model[3].weight.add_(1)
        moved = model[0].weight.clone()
        codes, scale = ternarize(moved)
        model[0].weight.copy_(latents_of(codes, scale))  # other latents, the same ternary matrix
    assert not torch.equal(model[0].weight, moved)
    assert fingerprint_model(model) == before and fingerprint_model(model).digest == before.digest


def test_a_changed_code_of_a_model_is_found() -> None:
    model = stack()
    before = fingerprint_model(model)
    for _ in range(20):
        other = copy.deepcopy(model)
        layer = other[0] if torch.rand(()) < 0.5 else other[2]
        codes, scale = ternarize(layer.weight.detach())
        position = int(torch.randint(codes.numel(), ()))
        codes.view(-1)[position] = (int(codes.view(-1)[position]) + 2) % 3 - 1
        layer.weight.data = latents_of(codes, scale).float()
        after = fingerprint_model(other)
        assert after != before and after.digest != before.digest
        assert sum(after.tensors[name] != before.tensors[name] for name in ("0", "2")) == 1


def test_a_changed_scale_of_a_model_is_found() -> None:
    model = stack()
    before = fingerprint_model(model)
    with torch.no_grad():
        model[2].weight.mul_(2)
    after = fingerprint_model(model)
    assert after.tensors["0"] == before.tensors["0"]
    assert after.tensors["2"].codes == before.tensors["2"].codes
    assert after.tensors["2"].scale == before.tensors["2"].scale / 2 and after.digest != before.digest


def test_float32_and_bfloat16_latents_have_one_fingerprint(tiny_model) -> None:
    model = tiny_model("Llama")
    convert_to_bitlinear(model)
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    assert any((a != b).any() for a, b in zip(model.parameters(), rounded.parameters(), strict=True))
    assert fingerprint_model(rounded).digest == fingerprint_model(model).digest
    assert len(fingerprint_model(model).tensors) == 14


def test_order_of_layers_does_not_matter() -> None:
    a, b = fingerprint_codes(random_codes(4, 4), SCALE), fingerprint_codes(random_codes(4, 4), SCALE)
    one = Fingerprint({"a": a, "b": b})
    assert Fingerprint({"b": b, "a": a}).digest == one.digest
    assert Fingerprint({"a": b, "b": a}).digest != one.digest
    assert Fingerprint({"a": a}).digest != one.digest
    assert Fingerprint({"a": a, "c": b}).digest != one.digest
    assert Fingerprint({"a": a, "b": b}, definition=DEFINITION + 1).digest != one.digest


def test_fingerprint_leaves_the_model_alone() -> None:
    model = stack()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    versions = [parameter._version for parameter in model.parameters()]
    fingerprint_model(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter._version for parameter in model.parameters()] == versions
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


# In a file


def test_json_round_trip() -> None:
    found = fingerprint_model(stack())
    text = json.dumps(found.to_json())
    again = Fingerprint.from_json(json.loads(text))
    assert again == found and again.digest == found.digest == json.loads(text)["digest"]
    assert json.dumps(again.to_json()) == text


def edits() -> list[tuple[str, tuple[str, ...], object]]:
    return [
        ("a code", ("tensors", "0", "codes"), "0123456789abcdef"),
        ("a scale", ("tensors", "0", "scale"), 12.5),
        ("zeros", ("tensors", "2", "zeros"), 1),
        ("a shape", ("tensors", "2", "shape"), [20, 37]),
        ("the digest", ("digest",), "0" * 64),
        ("a layer added", ("tensors", "9"), {"shape": [4, 4], "codes": "0" * 16, "scale": 1.0, "zeros": 16}),
    ]


@pytest.mark.parametrize(
    "what, path, value", edits(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_edited_json_is_refused(what: str, path: tuple[str, ...], value: object) -> None:
    data = fingerprint_model(stack()).to_json()
    Fingerprint.from_json(data)
    entry = data
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    with pytest.raises(ValueError, match="digest does not fit"):
        Fingerprint.from_json(data)


def test_removed_layer_is_refused() -> None:
    data = fingerprint_model(stack()).to_json()
    del data["tensors"]["2"]
    with pytest.raises(ValueError, match="digest does not fit"):
        Fingerprint.from_json(data)


def test_another_definition_is_refused() -> None:
    other = dataclasses.replace(fingerprint_model(stack()), definition=DEFINITION + 1)
    with pytest.raises(ValueError, match=f"definition {DEFINITION + 1}, this package has {DEFINITION}"):
        Fingerprint.from_json(other.to_json())


# Names


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj",
        "module.model.layers.0.mlp.up_proj",
        "_orig_mod.model.layers.0.mlp.up_proj",
        "_orig_mod.module.model.layers.0._checkpoint_wrapped_module.mlp.up_proj",
        "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.up_proj",
        "model.layers.0.mlp.up_proj._orig_mod",
    ],
)
def test_names_are_cleaned(name: str) -> None:
    assert clean_name(name) == "model.layers.0.mlp.up_proj"


def test_names_that_only_look_alike_stay() -> None:
    assert clean_name("model.modules.0.submodule.up_proj") == "model.modules.0.submodule.up_proj"


def test_wrapped_models_have_the_same_fingerprint() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = stack()
    expected = fingerprint_model(model).digest
    assert fingerprint_model(torch.compile(model)).digest == expected
    assert fingerprint_model(nn.DataParallel(model)).digest == expected
    wrapped = copy.deepcopy(model)
    wrapped[0], wrapped[2] = checkpoint_wrapper(wrapped[0]), torch.compile(wrapped[2])
    assert type(wrapped[0]) is not BitLinear
    assert fingerprint_model(torch.compile(wrapped)).digest == expected
