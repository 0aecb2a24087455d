"""What a stored model is, by its config.json alone; and our entry in it."""

from __future__ import annotations

from typing import Any

import pytest

from axolotl_bitnet.formats.recognize import recognize
from axolotl_bitnet.model.entry import CONFIG_KEY
from axolotl_bitnet.model.layer_plan import Plan
from axolotl_bitnet.ternary import DEFINITION

ENTRY = {"converted": ["a"]}
BITNET = {"quant_method": "bitnet"}


@pytest.mark.parametrize(
    ("config", "kind", "linear_class"),
    [
        ({}, "unlisted", None),
        ({"quantization_config": None}, "unlisted", None),
        ({CONFIG_KEY: ENTRY}, "latents", None),
        ({CONFIG_KEY: None}, "latents", None),  # damaged: reading says so
        ({CONFIG_KEY: ENTRY | {"format": "dense"}}, "dense", None),
        ({CONFIG_KEY: ENTRY, "quantization": {"bits": 2}}, "mlx", None),
        ({CONFIG_KEY: ENTRY, "quantization_config": BITNET}, "packed", "bitlinear"),
        ({CONFIG_KEY: ENTRY, "quantization_config": {"quant_method": "gptq"}}, "packed", None),
        ({"quantization_config": BITNET}, "third-party", "bitlinear"),
        ({"quantization_config": BITNET, "model_type": "bitnet"}, "third-party", "autobitlinear"),
        (
            {"quantization_config": BITNET | {"linear_class": "bitlinear"}, "model_type": "bitnet"},
            "third-party",
            "bitlinear",
        ),
        (
            {
                "quantization_config": BITNET
                | {"linear_class": "autobitlinear", "quantization_mode": "online"},
            },
            "online",
            "autobitlinear",
        ),
        ({"quantization_config": BITNET | {"quantization_mode": "online"}}, "third-party", "bitlinear"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized", None),
        ({"quantization_config": {}}, "quantized", None),
    ],
)
def test_recognize(config: dict[str, Any], kind: str, linear_class: str | None) -> None:
    found = recognize(config)
    assert (found.kind, found.linear_class) == (kind, linear_class)


def test_an_entry_is_read_as_it_was_written() -> None:
    for plan in (Plan(["a", "b"], ["c"]), Plan(["a"], [], {"a": "model.a"})):
        entry = plan.to_entry()
        assert entry["definition"] == DEFINITION and Plan.from_entry(entry) == plan
        assert ("saved_as" in entry) == bool(plan.saved_as)
    for wrong in (None, [], "text", {}, {"converted": []}):
        assert Plan.from_entry(wrong) is None
    for damaged in ({"converted": 1e309}, {"converted": ["a"], "dense": "b"}, {"converted": [[]]}):
        with pytest.raises(ValueError, match="other things than names"):
            Plan.from_entry(damaged)
