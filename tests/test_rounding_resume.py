"""Stochastic rounding and checkpoints: resumed by as many processes, with the same rounding, only."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("axolotl.cli")

from axolotl_bitnet.plugin import resume
from axolotl_bitnet.plugin.args import BitNetConfig


def test_only_by_as_many_processes_and_with_the_same_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    options, checkpoint = BitNetConfig(latent_dtype="bfloat16"), Path("checkpoint-4")
    monkeypatch.setenv("WORLD_SIZE", "2")
    saved = resume.settings_of(options, {"converted": ["a"], "definition": 1}, rounding=True)
    monkeypatch.setattr(resume, "recorded", lambda folder: saved)
    resume.refuse_other_run(checkpoint, options, rounding=True)
    with pytest.raises(resume.ResumeError, match="rounded stochastically and are now rounded to nearest"):
        resume.refuse_other_run(checkpoint, options)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(resume.ResumeError, match="saved by 2 processes and this run has 4"):
        resume.refuse_other_run(checkpoint, options, rounding=True)
    saved = resume.settings_of(options, {"converted": ["a"], "definition": 1})
    resume.refuse_other_run(checkpoint, options)  # rounded to nearest: any number of processes
