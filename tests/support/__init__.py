"""Helpers that several test files share. There are no tests here; a helper of one file stays in that file."""

import os
from pathlib import Path

os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "falcon-e" / "tiny"
"""The tiny recipe's folder: its model's config and tokenizer, and its rows."""
