"""What preflight says of a base, and the rescaling of one that is already ternary."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.model.preflight import NEVER_TERNARY, Preflight, preflight
from axolotl_bitnet.ternary import dequantize, scale_of, ternarize


def model_of(**weights: Tensor) -> nn.ModuleDict:
    model = nn.ModuleDict()
    for name, weight in weights.items():
        rows, columns = weight.shape
        model[name] = BitLinear(columns, rows, bias=False, dtype=weight.dtype, device=weight.device)
        model[name].weight.data = weight.clone()
    return model


def random_codes(rows: int = 32, columns: int = 48, density: float = 0.66) -> Tensor:
    codes = torch.where(torch.rand(rows, columns) < 0.5, -1, 1).to(torch.int8)
    return codes * (torch.rand(rows, columns) < density)


def latents(rows: int = 32, columns: int = 48) -> Tensor:
    """Like those of a trained ternary model: three heaps, around -1/s, 0 and 1/s."""
    return random_codes(rows, columns) * 0.02 + torch.randn(rows, columns) * 0.003


def inspect(model: nn.ModuleDict) -> Preflight:
    return preflight(model, list(model))


# Already ternary


@pytest.mark.parametrize("density", [0.05, 0.4, 0.66, 0.95])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounded", [False, True])
def test_dense_ternary_is_rescaled(oracle, density: float, stored: torch.dtype, rounded: bool) -> None:
    codes, s = random_codes(density=density), scale_of(torch.tensor(0.0173))
    dense = dequantize(codes, s, torch.bfloat16 if rounded else torch.float32).to(stored)
    model = model_of(proj=dense)
    parameter = model["proj"].weight
    assert ternarize(dense)[1] > s  # quantizing it again would lose scale

    result = inspect(model)
    assert result.rescaled == ["proj"] and result.change == 0 and result.warnings() == []
    assert model["proj"].weight is parameter and parameter.dtype == stored
    found, scale = oracle.weights(parameter)
    np.testing.assert_array_equal(found, codes.numpy())
    assert scale == float(s)


@pytest.mark.parametrize("density", [0.3, 0.5, 0.66, 0.75])
def test_a_second_look_changes_nothing(density: float) -> None:
    """What was rescaled is latent, after a save and a load too: rescaling it again would change its scale."""
    codes = torch.zeros(32, 48, dtype=torch.int8)
    codes.view(-1)[torch.randperm(codes.numel())[: int(density * codes.numel())]] = 1
    s = scale_of(torch.tensor(0.0173))
    model = model_of(proj=dequantize(codes, s, torch.bfloat16))
    assert inspect(model).rescaled == ["proj"]
    again = inspect(model)
    assert torch.equal(ternarize(model["proj"].weight.detach())[1], s)
    assert again.rescaled == []


def test_dense_ternary_of_any_magnitude(oracle) -> None:
    """The base need not come from this definition: its magnitude may be any bfloat16."""
    codes = random_codes(24, 40)
    for mantissa in range(0, 128, 3):
        magnitude = (1 + mantissa / 128) / 64
        model = model_of(proj=codes.to(torch.bfloat16) * magnitude)
        assert inspect(model).rescaled == ["proj"]
        found, scale = oracle.weights(model["proj"].weight)
        np.testing.assert_array_equal(found, codes.numpy())
        assert scale == oracle.scale(np.float32(magnitude))
        assert 1 / scale == pytest.approx(magnitude, rel=2**-8 + 2**-9)


def test_ternary_without_zeros_is_latent_already() -> None:
    codes = random_codes(density=2)
    assert codes.all()
    model = model_of(proj=codes.to(torch.bfloat16) * 0.0173)
    before = model["proj"].weight.detach().clone()
    result = inspect(model)
    assert result.rescaled == [] and result.change == 0
    assert torch.equal(model["proj"].weight, before)


def test_output_of_a_dense_ternary_layer_is_kept() -> None:
    """The point of it: the rescaled layer computes with the magnitude that the base had, up to bf16."""
    codes, s = random_codes(), scale_of(torch.tensor(0.02))
    model = model_of(proj=dequantize(codes, s, torch.bfloat16))
    x = torch.randn(5, 48)
    exact = x @ dequantize(codes, s).t()
    shrunk = model["proj"](x)
    inspect(model)
    kept = model["proj"](x)
    assert (kept - exact).norm() < 0.02 * exact.norm() < 0.3 * (shrunk - exact).norm()


def test_tiny_dense_ternary_does_not_crash() -> None:
    """Magnitudes below the definition's epsilon have no latents; that is a finding, not a traceback."""
    model = model_of(tiny=random_codes().to(torch.bfloat16) * 1e-6, good=latents())
    result = inspect(model)
    assert "tiny" not in result.rescaled


def test_dense_ternary_with_one_weight_does_not_crash() -> None:
    weight = torch.zeros(16, 24, dtype=torch.bfloat16)
    for mantissa in range(128):
        weight[3, 5] = (1 + mantissa / 128) / 64
        inspect(model_of(proj=weight))


# Latent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_are_not_touched(dtype: torch.dtype) -> None:
    model = model_of(a=latents().to(dtype), b=latents(8, 12).to(dtype))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    versions = [parameter._version for parameter in model.parameters()]
    result = inspect(model)
    assert (result.rescaled, result.zero, result.broken, result.warnings()) == ([], [], [], [])
    assert 0 < result.change < NEVER_TERNARY
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert [parameter._version for parameter in model.parameters()] == versions


@pytest.mark.parametrize("almost", [0.01, 1.01])
def test_one_other_magnitude_makes_it_latent(almost: float) -> None:
    weight = random_codes().float() * 0.02
    weight[4, 7] = 0.02 * almost if almost < 1 else 0.0202
    model = model_of(proj=weight)
    assert inspect(model).rescaled == []
    assert torch.equal(model["proj"].weight, weight)


def test_change_is_the_relative_error_by_hand(oracle) -> None:
    weights = {
        "a": torch.randn(64, 96),
        "b": latents(),
        "c": dequantize(random_codes(), scale_of(torch.tensor(0.02))),
    }
    expected = []
    for name in ("a", "b"):
        codes, s = oracle.weights(weights[name])
        w = weights[name].double().numpy()
        expected.append(np.linalg.norm(w - codes / np.float64(s)) / np.linalg.norm(w))
    assert expected[0] == pytest.approx(0.51, abs=0.02)  # Gaussian
    assert inspect(model_of(**weights)).change == pytest.approx(sum(expected) / 3, rel=1e-5)


# Large matrices


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 x 48 elements, rows 0 and 31 are measured."""
    monkeypatch.setattr("axolotl_bitnet.model.preflight.SAMPLE", 50)


def test_every_nth_row_is_measured(few_rows: None) -> None:
    weight = latents()
    rows = weight[::31]
    expected = (rows - dequantize(*ternarize(rows))).norm() / rows.norm()
    assert inspect(model_of(proj=weight)).change == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("row", [0, 17, 31])
def test_one_other_magnitude_in_any_row_makes_it_latent(few_rows: None, row: int) -> None:
    weight = random_codes().float() * 0.02
    assert inspect(model_of(proj=weight)).rescaled == ["proj"]
    weight[row, 5] = 0.01
    model = model_of(proj=weight)
    assert inspect(model).rescaled == []
    assert torch.equal(model["proj"].weight, weight)


def test_rows_of_zeros_are_no_measure(few_rows: None) -> None:
    weight = torch.randn(32, 48)
    weight[::31] = 0
    expected = (weight - dequantize(*ternarize(weight))).norm() / weight.norm()
    assert inspect(model_of(proj=weight)).change == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_in_any_row_are_named(few_rows: None, bad: float) -> None:
    weight = latents()
    weight[17, 5] = bad
    assert inspect(model_of(proj=weight)).broken == ["proj"]


# Warnings


def test_never_ternary_is_said() -> None:
    result = inspect(model_of(a=torch.randn(64, 64) * 0.02, b=torch.randn(64, 96)))
    (warning,) = result.warnings()
    assert re.search("never.*ternary", warning) and f"{result.change:.0%}" in warning
    assert result.rescaled == result.zero == result.broken == []
    assert result.warnings(maybe_dense=False) == []


def test_zeros_are_named() -> None:
    model = model_of(good=latents(), dead=torch.zeros(8, 8))
    result = inspect(model)
    assert result.zero == ["dead"] and result.rescaled == [] and not model["dead"].weight.any()
    (warning,) = result.warnings()
    assert "all zero in dead:" in warning and "good" not in warning


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("base", ["latent", "ternary", "zero"])
def test_nan_and_inf_are_named(bad: float, base: str) -> None:
    weight = {"latent": latents(8, 8), "ternary": random_codes(8, 8) * 0.02, "zero": torch.zeros(8, 8)}[base]
    weight = weight.float()
    weight[2, 3] = bad
    result = inspect(model_of(good=latents(), rotten=weight))
    assert result.broken == ["rotten"] and result.zero == result.rescaled == []
    assert math.isfinite(result.change)
    (warning,) = result.warnings()
    assert "NaN or Inf in rotten:" in warning and "good" not in warning


def test_long_lists_are_shortened() -> None:
    result = inspect(model_of(**{f"w{i}": torch.zeros(4, 4) for i in range(7)}))
    (warning,) = result.warnings()
    assert "w0, w1, w2, w3 and 3 more" in warning


def test_all_findings_at_once() -> None:
    broken = torch.full((4, 4), math.nan)
    result = inspect(model_of(a=broken, b=torch.zeros(4, 4), c=torch.randn(64, 64)))
    assert [word in line for word, line in zip(["NaN", "zero", "never"], result.warnings(), strict=True)] == [
        True
    ] * 3


# What is passed over


def test_meta_weights_are_passed_over() -> None:
    model = model_of(here=torch.zeros(4, 4), elsewhere=torch.empty(4, 4, device="meta"))
    result = inspect(model)
    assert result.zero == ["here"] and model["elsewhere"].weight.is_meta
    assert inspect(model_of(only=torch.empty(4, 4, device="meta"))) == Preflight()


def test_only_the_named_layers_are_looked_at() -> None:
    ternary = dequantize(random_codes(), scale_of(torch.tensor(0.02)))
    model = model_of(a=ternary, b=ternary)
    result = preflight(model, ["b"])
    assert result.rescaled == ["b"]
    assert torch.equal(model["a"].weight, ternary) and not torch.equal(model["b"].weight, ternary)


def test_unsharded_empty_weights_are_passed_over() -> None:
    """ZeRO-3 leaves weights of shape (0,) outside of forward."""
    model = model_of(proj=latents())
    model["proj"].weight.data = torch.empty(0)
    assert inspect(model) == Preflight()


def test_a_whole_model(tiny_model) -> None:
    from axolotl_bitnet.model.convert import convert_to_bitlinear

    model = tiny_model("Llama")
    names = convert_to_bitlinear(model)
    expected = {}
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            codes, _ = ternarize(weight)
            expected[name] = codes
            weight.copy_(dequantize(codes, scale_of(torch.tensor(0.02))))
    assert preflight(model, names).rescaled == names
    for name in names:
        codes, scale = ternarize(model.get_submodule(name).weight)
        assert torch.equal(codes, expected[name]) and torch.equal(scale, scale_of(torch.tensor(0.02)))
