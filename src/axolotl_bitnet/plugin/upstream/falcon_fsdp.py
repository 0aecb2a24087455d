"""Axolotl's check that refuses FSDP for every base named "falcon", for ternary runs only.

Changes ``check_falcon_fsdp`` of Axolotl's config class (0.21; 0.19 has none). Without it nothing is refused,
and nothing is changed. Tests: tests/test_sharding.py, tests/test_upstream_names.py.
"""

from __future__ import annotations

from typing import Any


def let_llama_falcons_shard(merged: Any) -> None:
    """Axolotl 0.21 refuses FSDP for every base with "falcon" in its name. It means the old models, which
    the plugin refuses by its config; Falcon-E and Falcon3 are Llamas. Nothing changes without the flag."""
    original = getattr(merged, "check_falcon_fsdp", None)
    if original is not None:

        def check_falcon_fsdp(self: Any) -> Any:
            return self if self.use_onebitllms else original(self)

        merged.check_falcon_fsdp = check_falcon_fsdp
