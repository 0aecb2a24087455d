"""An artifact held against what trained: every ternary code and every scale, exactly."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..fingerprint import Fingerprint
from .latent import LatentCheckpoint
from .packed import PackedCheckpoint
from .stream import CheckpointError, read_json

RUN_FILE = "bitnet.json"
"""Written into a run's output folder: the fingerprint of the trained model and the verdict on every
artifact."""


class VerificationError(RuntimeError):
    """An artifact is not the model that trained. The latents are safe; the message says where they are."""


@dataclass
class VerificationReport:
    """What a comparison found.

    Attributes:
        layers: number of ternary layers compared.
        weights: number of ternary weights in them.
        mismatches: one line a layer that differs, saying how.
        digest: digest of the reference fingerprint.
    """

    layers: int = 0
    weights: int = 0
    mismatches: list[str] = field(default_factory=list)
    digest: str = ""

    @property
    def ok(self) -> bool:
        return not self.mismatches and self.layers > 0

    def summary(self) -> str:
        """One line for people."""
        if self.ok:
            counts = f"{self.layers} ternary layers, {self.weights:,} codes and {self.layers} scales"
            return f"verified: {counts} are the trained ones"
        shown = "; ".join(self.mismatches[:5])
        more = f"; and {len(self.mismatches) - 5} more" if len(self.mismatches) > 5 else ""
        return f"NOT the trained model: {shown}{more}"


def compare(found: Fingerprint, expected: Fingerprint) -> VerificationReport:
    """Hold one fingerprint against another, layer by layer."""
    report = VerificationReport(digest=expected.digest)
    for name, reference in expected.tensors.items():
        candidate = found.tensors.get(name)
        report.layers += 1
        report.weights += reference.shape[0] * reference.shape[1]
        if candidate is None:
            report.mismatches.append(f"{name} is missing")
        elif candidate.shape != reference.shape:
            report.mismatches.append(f"{name} has shape {candidate.shape}, trained {reference.shape}")
        elif candidate.codes != reference.codes:
            report.mismatches.append(f"{name}: codes differ")
        elif candidate.scale != reference.scale:  # a NaN differs from itself, as it should
            report.mismatches.append(f"{name}: scale {candidate.scale:g}, trained {reference.scale:g}")
    extra = sorted(found.tensors.keys() - expected.tensors.keys())
    report.mismatches += [f"{name} is ternary, but was not in training" for name in extra]
    return report


def verify_checkpoint(artifact: str | Path, reference: str | Path | Fingerprint) -> VerificationReport:
    """Check that a packed folder is the model that trained.

    Args:
        artifact: folder that :func:`~axolotl_bitnet.pack_checkpoint` made.
        reference: a fingerprint, a run's output folder (its ``bitnet.json``), or a folder of latents.

    Raises:
        CheckpointError: either cannot be read.
    """
    return compare(PackedCheckpoint(artifact).fingerprint(), read_reference(reference))


def read_reference(reference: str | Path | Fingerprint) -> Fingerprint:
    """A fingerprint from whatever names one; see :func:`verify_checkpoint`."""
    if isinstance(reference, Fingerprint):
        return reference
    folder = Path(reference)
    run_file = folder if folder.is_file() else folder / RUN_FILE
    if run_file.exists():
        try:
            return Fingerprint.from_json(read_json(run_file)["fingerprint"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{run_file} holds no usable fingerprint: {error}") from error
    return LatentCheckpoint(folder).fingerprint()
