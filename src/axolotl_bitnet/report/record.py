"""A run's record for the report, ``run.json``: config, versions, machine, log.

Axolotl and the Trainer leave no such record: the logs are in checkpoints alone, up to the last one.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

HIDDEN = "(hidden)"

_PACKAGES = (
    "axolotl-bitnet",
    "axolotl",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "deepspeed",
    "triton",
    "safetensors",
)
_SECRET_KEY = re.compile(
    r"(^|[_-])(token|key|pwd|auth|bearer|sas)$"
    r"|(api|access|auth|private|account)[_-]?(key|token)|secret|passw(or)?d|passphrase|credential|webhook",
    re.IGNORECASE,
)
_NO_SECRET = re.compile(  # a vocabulary's tokens, and names of columns and templates
    r"(bos|eos|pad|unk|cls|sep|mask|eot|eom|bot|image|audio|video|boi|eoi|decoder_start)_token(_id)?"
    r"|.*_thinking_key|.*_experiment_key",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\b(hf_|api_org_|sk-|gh[pousr]_|github_pat_|xox[abprs]-|AKIA|ASIA|glpat-)[A-Za-z0-9_\-]{12,}"
    r"|(?<=://)[^/\s@]+(?=@)"  # user:password@ in an address
    r"|(?<=[?&])[^=&\s]*(token|key|secret|sig|signature)[^=&\s]*=[^&\s]+",
    re.IGNORECASE,
)


def redact(value: Any, key: str = "") -> Any:
    """A config as plain JSON values, without its secrets and without its empty (None) entries.

    Removed are texts under the key of a secret (`hub_token`, `wandb_api_key`, ...), and within any text
    whatever has the form of an access token or of the credentials in an address. In doubt, a text is removed.
    """
    if isinstance(value, Mapping):
        return {str(k): redact(v, str(k)) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [redact(item, key) for item in value]
    if value is None or isinstance(value, (bool, float)):
        return value
    if _SECRET_KEY.search(key) and not _NO_SECRET.fullmatch(key):
        return HIDDEN
    if isinstance(value, int):
        return value
    return _SECRET_VALUE.sub(HIDDEN, str(value))


def versions() -> dict[str, str]:
    """Of Python and of the packages that a run's outcome depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    import torch  # the page reads records without it

    if torch.cuda.is_available() and torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def machine(processes: int) -> str:
    """What it runs on, in words."""
    import torch

    if not torch.cuda.is_available():
        device = f"CPU ({platform.machine()})"
    else:
        device = torch.cuda.get_device_name()
    return f"{processes} × {device}" if processes > 1 else device


def begun(config: Mapping[str, Any], processes: int, resumed_at: int | None) -> dict[str, Any]:
    """The record of a run that begins, without a log as yet.

    Args:
        config: as the user gave it; secrets are left out here.
        processes: number of processes that train.
        resumed_at: step of the checkpoint that it continues from.
    """
    return {
        "started": now(),
        "finished": None,
        "resumed_at": resumed_at,
        "machine": machine(processes),
        "versions": versions(),
        "config": redact(config),
        "log": [],
    }


def now() -> str:
    """The time, UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
