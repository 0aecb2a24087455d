"""These tests need vLLM: ``make test-vllm`` makes an environment that has it. Elsewhere none is collected."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before vLLM is imported: in one process, so that a test sees its models.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*"]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def demo() -> Path:
    """The packed model of ``make demo``."""
    folder = ROOT / "outputs" / "tiny-sft" / "packed"
    if not (folder / "config.json").exists():
        pytest.skip(f"{folder} is not there: make demo")
    return folder


@pytest.fixture
def served() -> Iterator[Callable[..., Any]]:
    """``served(folder, **options)``: a vLLM engine, one at a time; in float32 and eager unless told
    otherwise."""
    import vllm

    engines: list[Any] = []

    def serve(folder: Path, **options: Any) -> Any:
        settings: dict[str, Any] = dict(
            dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=32
        )
        engines.append(vllm.LLM(str(folder), **settings | options))
        return engines[-1]

    yield serve
    from vllm.distributed import cleanup_dist_env_and_memory

    engines.clear()
    cleanup_dist_env_and_memory()
