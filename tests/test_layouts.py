"""What layouts need before the model is loaded. (What is refused of them: test_args.py.)"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import axolotl.utils.distributed
import pytest
from axolotl.utils.dict import DictDefault

from axolotl_bitnet import BitNetPlugin

OFFLOAD = {"use_onebitllms": True, "fsdp_version": 2, "fsdp_config": {"offload_params": True}}


@pytest.mark.parametrize(
    ("change", "connects"),
    [
        ({}, True),
        ({"fsdp_version": "2"}, True),
        ({"use_onebitllms": None}, False),
        ({"fsdp_version": 1}, False),
        ({"fsdp_config": {"offload_params": False}}, False),
        ({"fsdp_config": {}}, False),
        ({"fsdp_config": None}, False),
    ],
)
def test_offloaded_weights_are_connected_by_cpus_too(
    change: dict[str, Any], connects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")  # as a launcher sets it
    calls = SimpleNamespace(count=0)
    monkeypatch.setattr(
        axolotl.utils.distributed,
        "init_distributed_state",
        lambda: setattr(calls, "count", calls.count + 1),
    )
    cfg = DictDefault(OFFLOAD | change)
    assert BitNetPlugin().load_datasets(cfg, preprocess=True) is None
    assert calls.count == 0, "preprocessing connects nothing"
    assert BitNetPlugin().load_datasets(cfg) is None
    assert calls.count == int(connects)
