"""What the tests share: a fixed seed, the definition a second time in numpy, and tiny random models."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For two workers, files of slow tests first: none begins when the other worker has no more."""
    if hasattr(config, "workerinput"):
        tests = Counter(item.path for item in items)
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path] / tests[item.path])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20240227)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: a pool of threads only gets in its own way


@pytest.fixture(autouse=True)
def _without_kd_plugin() -> Iterator[None]:
    """Axolotl keeps plugins for the whole process, and this one of its own breaks runs that do without it."""
    yield
    if base := sys.modules.get("axolotl.integrations.base"):
        base.PluginManager.get_instance().plugins.pop("axolotl.integrations.kd.KDPlugin", None)


def _float32(x: Tensor) -> np.ndarray:
    return x.detach().to(torch.float32).contiguous().numpy()


class Oracle:
    """The definition in numpy, from its formulas alone: float32 steps, float64 sums, int64 codes."""

    @staticmethod
    def bf16(x: np.ndarray) -> np.ndarray:
        """float32 rounded to bfloat16, half to even, in integer arithmetic. Finite input only."""
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.astype(np.uint32).view(np.float32).reshape(np.shape(x))

    @classmethod
    def absmean(cls, weight: Tensor) -> np.float32:
        w = cls.bf16(_float32(weight)).astype(np.float64)
        return max(np.float32(np.abs(w).sum() / w.size), np.float32(1e-5))

    @classmethod
    def scale(cls, g: np.float32) -> np.float32:
        return cls.bf16(np.float32(1) / cls.bf16(g)).reshape(())[()]

    @classmethod
    def weights(cls, weight: Tensor) -> tuple[np.ndarray, np.float32]:
        """int64 codes and ``s``."""
        g = cls.absmean(weight)
        scaled = cls.bf16(_float32(weight)) * (np.float32(1) / g)
        return np.clip(np.rint(scaled), -1, 1).astype(np.int64), cls.scale(g)

    @staticmethod
    def activations(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """int64 codes and float32 ``r`` of shape (..., 1)."""
        values = _float32(x)
        a = np.maximum(np.abs(values).max(axis=-1, keepdims=True), np.float32(1e-5))
        r = (np.float32(1) / a) * np.float32(127)
        return np.clip(np.rint(values * r), -128, 127).astype(np.int64), r

    @classmethod
    def forward(cls, x: Tensor, weight: Tensor) -> np.ndarray:
        """float32 y without bias, to the bit."""
        codes_x, r = cls.activations(x)
        codes_w, s = cls.weights(weight)
        return (codes_x @ codes_w.T).astype(np.float32) / (r * s)

    @classmethod
    def operands(cls, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """float64 ``codes_x / r`` and ``codes_w / s``: what the backward multiplies dy with."""
        codes_x, r = cls.activations(x)
        codes_w, s = cls.weights(weight)
        return torch.from_numpy(codes_x / r.astype(np.float64)), torch.from_numpy(codes_w / np.float64(s))


@pytest.fixture(scope="session")
def oracle() -> type[Oracle]:
    return Oracle


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., nn.Module]:
    """``support.models.tiny_model``, which needs transformers."""
    pytest.importorskip("transformers")
    from support.models import tiny_model

    return tiny_model


@pytest.fixture
def pair(tiny_model: Callable[..., nn.Module]) -> Callable[..., tuple[nn.Module, nn.Module]]:
    """``pair("Llama", dtype, **config)``: one random model converted as it is, and fused."""
    from support.layers import pair_of

    def build(
        family: str = "Llama", dtype: torch.dtype = torch.float32, **overrides: Any
    ) -> tuple[nn.Module, nn.Module]:
        return pair_of(tiny_model(family, **overrides).to(dtype))

    return build
