"""The names of what a run leaves in its output folder, beside the latents that Axolotl saves there."""

from __future__ import annotations

RUN_FILE = "bitnet.json"
"""The fingerprint of the trained model and the verdict on every artifact."""

RUN_LOG = "run.json"
"""The config, the versions and the training log, for the report."""

MONITOR_FILE = "monitor.json"
"""Every layer's zeros, flips and scales, at the start, at each save and at the end."""

REPORT = "report"
"""Folder of the report's page and plots."""

PAGE = "index.html"
"""In it: the page."""

CARD = "README.md"
"""The model card."""

PACKED = "packed"
"""Folder of the packed model."""

MERGED = "merged"
"""Folder into which Axolotl merges sharded weights."""

ASIDE = "_previous"
"""Folder for a previous run's files while a run writes its own. Uploads to a hub leave out names that begin
with an underscore."""

MADE_HERE = "made-by-axolotl-bitnet"
"""File in such a folder: without it, the folder is the user's and is never deleted."""

CHECKPOINT = "checkpoint-"
"""Beginning of the folders that the Trainer saves in; the number of the step follows."""

STATE = "trainer_state.json"
"""In every `checkpoint-N`: what the Trainer writes last."""
