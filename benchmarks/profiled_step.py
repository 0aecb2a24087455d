"""One profiled training step in figures: when the GPU is busy, NCCL, launches, and what takes the time."""

from __future__ import annotations

from typing import Any

import torch

MOST = 30  # functions that are listed


def summary(profile: Any, profiled_ms: float, step_ms: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """From a profiled step: figures for a row, and the longest functions of GPU and CPU.

    Args:
        profile: a stopped ``torch.profiler.profile``.
        profiled_ms: what the step took while it was profiled.
        step_ms: what a step takes otherwise; the GPU idles the part of it in which no kernel runs.
    """
    kernels: list[tuple[int, int]] = []
    on_gpu: dict[str, list[float]] = {}
    on_cpu: dict[str, list[float]] = {}
    nccl = launches = 0
    for event in profile.profiler.kineto_results.events():
        name, took = event.name(), event.duration_ns()
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            if name.startswith(("ProfilerStep", "Optimizer", "FSDP::", "autograd", "aten::", "nccl:")):
                continue  # a range on the GPU's timeline, not a kernel
            add(on_gpu, name, took)
            if "nccl" in name:
                nccl += took
            else:
                kernels.append((event.start_ns(), event.start_ns() + took))
        else:
            launches += "LaunchKernel" in name
            add(on_cpu, name, took)
    busy = union(kernels)
    figures = {
        "busy_ms": round(busy / 1e6, 1),
        "nccl_ms": round(nccl / 1e6, 1),
        "launches": launches,
        "profiled_ms": round(profiled_ms, 1),
        "idle_percent": round(100 * (1 - busy / 1e6 / step_ms)) if busy else "",
    }
    return figures, {"gpu": longest(on_gpu), "cpu": longest(on_cpu)}


def add(to: dict[str, list[float]], name: str, nanoseconds: float) -> None:
    entry = to.setdefault(name[:120], [0.0, 0.0])
    entry[0] += nanoseconds / 1e6
    entry[1] += 1


def longest(found: dict[str, list[float]]) -> dict[str, list[float]]:
    """Milliseconds (children included) and calls of the functions that take longest."""
    ordered = sorted(found.items(), key=lambda item: -item[1][0])[:MOST]
    return {name: [round(ms, 2), int(calls)] for name, (ms, calls) in ordered}


def union(spans: list[tuple[int, int]]) -> int:
    """Nanoseconds that at least one of the spans covers."""
    covered, end = 0, 0
    for start, stop in sorted(spans):
        covered += max(0, stop - max(start, end))
        end = max(end, stop)
    return covered
