"""The Triton kernels without a GPU: their results in Triton's interpreter, and what compiles for NVIDIA's.

``tests/interpreted`` holds the tests of results; they run here, once, in a process of their own.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest

from support import ROOT
from support.processes import python

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

KIB = 1024

# Results


@pytest.mark.once
@pytest.mark.timeout(1800)
def test_results_in_the_interpreter() -> None:
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    ran = python(*command, ROOT / "tests" / "interpreted", timeout=1800, TRITON_INTERPRET="1")
    last = ran.stdout.strip().splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", last.partition(" in ")[0])}
    assert counts.pop("passed") > 850 and not counts.keys() - {"warning", "warnings"}, last
    files = {path.stem for path in (ROOT / "tests" / "interpreted").glob("test_*.py")}
    kernels = {path.stem for path in (ROOT / "src/axolotl_bitnet/ops/kernels").glob("*.py")}
    assert {
        f"test_kernels_{name}" for name in kernels - {"__init__", "arithmetic", "launch", "overlap"}
    } == files


# Compilation


@cache
def launches(arch: int) -> list[dict[str, Any]]:
    """Every launch of a model's step, compiled for a GPU of this compute capability; for Blackwell's consumer
    GPUs, whose shared memory is Ada's, the matrix products alone."""
    only = ["matmul"] if arch > 90 else []
    return json.loads(python("-m", "support.compile_kernels", str(arch), *only, TRITON_INTERPRET="0").stdout)


def of(arch: int, kernel: str) -> list[dict[str, Any]]:
    found = [launch for launch in launches(arch) if launch["kernel"] == kernel]
    assert found, {launch["kernel"] for launch in launches(arch)}
    return found


AMPERE = pytest.param(
    80, marks=pytest.mark.once
)  # a minute where none is in the cache; Ada has the same kernels
by_arch = pytest.mark.parametrize("arch", [AMPERE, 90])


@by_arch
def test_no_kernel_spills(arch: int) -> None:
    """Registers that do not suffice go to the stack, which is memory."""
    spilled = {
        f"{launch['call']}: {launch['kernel']} {launch['constants']}": launch["STACK"] + launch["LOCAL"]
        for launch in launches(arch)
        if launch["STACK"] or launch["LOCAL"] or launch["local"]
    }
    assert len(launches(arch)) > 50 and not spilled


@by_arch
def test_multiplication_and_addition_stay_two_roundings(arch: int) -> None:
    """Fused, they are another result. (The product's epilogue and the division fuse on purpose.)"""
    on_purpose = {"_matmul_tma", "_matmul_pointers", "_swiglu_forward", "_swiglu_backward"}
    on_purpose |= {"_swiglu_gradients"}
    fused = {launch["kernel"] for launch in launches(arch) if launch["fused"]}
    assert fused == on_purpose & {launch["kernel"] for launch in launches(arch)}


@pytest.mark.parametrize("arch", [AMPERE, 90, pytest.param(120, marks=pytest.mark.once)])
def test_products_run_on_int8_tensor_cores(arch: int) -> None:
    for launch in of(arch, "_matmul_pointers"):
        assert launch["mma"] or launch["wgmma"], launch
    if arch < 90:
        assert not any(launch["bulk"] or launch["wgmma"] for launch in launches(arch))
        assert {launch["kernel"] for launch in launches(arch)} & {"_matmul_tma"} == set()
        return
    for launch in of(arch, "_matmul_tma"):
        assert launch["bulk"] and launch["wgmma" if arch == 90 else "mma"], launch


@by_arch
def test_two_rows_to_sixteen_run_on_int8_tensor_cores(arch: int) -> None:
    """On rows of bytes by 4 and by 8, in whole steps and not; every thread loads 16 bytes at a time. The
    results are right only while the n-th number of an operand is the n-th thread's."""
    found = of(arch, "_few_rows")
    for launch in found:
        (layout,) = launch["layouts"]
        assert re.search(r"sizePerThread = \[1\], threadsPerWarp = \[32\], .*order = \[0\]", layout), layout
    assert all(launch["mma"] and not launch["wgmma"] for launch in found)
    assert {launch["constants"]["ROWS"] for launch in found} == {"2", "3", "4", "5", "8", "16"}
    assert {launch["constants"]["LANES"] for launch in found} == {"4", "8"}
    assert {launch["constants"]["EVEN"] for launch in found} == {"True", "False"}
    assert all(launch["wide"] >= int(launch["constants"]["HELD"]) * 2 for launch in found)


@by_arch
def test_one_row_or_two_are_multiplied_in_words_of_four_bytes(arch: int) -> None:
    """With one row of bytes a thread and two, from codes and from x."""
    found = of(arch, "_matvec") + of(arch, "_matvec_of_x")
    assert all(launch["dp4a"] and not launch["mma"] for launch in found)
    assert {launch["constants"]["ROWS"] for launch in found} == {"1", "2"}
    assert {launch["constants"]["EACH"] for launch in found} == {"1", "2"}


@by_arch
def test_products_of_a_few_rows_overlap_from_hopper_on(arch: int) -> None:
    """Every such kernel waits once; none does where the instruction does not exist."""
    found = of(arch, "_matvec") + of(arch, "_matvec_of_x") + of(arch, "_few_rows")
    assert {launch["overlap"] for launch in found} == {int(arch >= 90)}


@pytest.mark.parametrize(
    "arch, limit",
    [*(pytest.param(arch, 99, marks=pytest.mark.once) for arch in (80, 120)), (90, 227)],
)
def test_programs_fit_into_shared_memory(arch: int, limit: int) -> None:
    """One program. Ampere's run on Ada too, Blackwell's on its consumer GPUs: both have less."""
    for launch in launches(arch):
        assert launch["shared"] <= limit * KIB, launch
    if arch < 90:
        products = of(arch, "_matmul_pointers")
        assert {launch["constants"]["BLOCK_M"] for launch in products} == {"32", "128"}


def test_as_many_products_share_a_hopper_multiprocessor_as_are_launched() -> None:
    """228 KiB of shared memory, of which each program costs 1 KiB more than it asks for; 64 Ki registers."""
    cuts = {(tuple(sorted(launch["tiles"].items()))) for launch in of(90, "_matmul_tma")}
    assert len(cuts) >= 4
    for launch in of(90, "_matmul_tma"):
        residents = launch["tiles"]["residents"]
        assert (launch["shared"] + KIB) * residents <= 228 * KIB, launch
        assert launch["REG"] * 32 * launch["warps"] * residents <= 64 * KIB, launch
