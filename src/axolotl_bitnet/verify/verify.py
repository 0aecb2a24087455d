"""An artifact compared with the trained model: every ternary code and every scale, exactly; and everything
else, where the reference holds it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..formats.checkpoint import TernaryCheckpoint
from ..formats.export import open_checkpoint
from ..formats.latent import LatentCheckpoint
from ..model.fingerprint import Fingerprint
from ..run_folder import RUN_FILE
from ..storage.atomic import CheckpointError, read_json
from .contents import compare_companions, compare_config, compare_tensors
from .logits import compare_running
from .report import Check, VerificationError, VerificationReport

__all__ = ["RUN_FILE", "VerificationError", "VerificationReport", "compare", "verify_checkpoint"]


def compare(found: Fingerprint, expected: Fingerprint) -> VerificationReport:
    """Compare one fingerprint with another, layer by layer."""
    report = VerificationReport(digest=expected.digest)
    codes, scales = Check("codes", ""), Check("scales", "")
    for name, reference in expected.tensors.items():
        candidate = found.tensors.get(name)
        report.layers += 1
        report.weights += reference.shape[0] * reference.shape[1]
        if candidate is None:
            codes.mismatches.append(f"{name} is missing")
        elif candidate.shape != reference.shape:
            codes.mismatches.append(f"{name} has shape {candidate.shape}, trained {reference.shape}")
        elif candidate.codes != reference.codes:
            codes.mismatches.append(f"{name}{_DIFFER}")
        elif candidate.scale != reference.scale:  # a NaN differs from itself, as it should
            scales.mismatches.append(f"{name}: scale {candidate.scale:g}, trained {reference.scale:g}")
    extra = sorted(found.tensors.keys() - expected.tensors.keys())
    codes.mismatches += [f"{name} is ternary, but was not in training" for name in extra]
    codes.detail = f"{report.weights:,} in {report.layers} layers, exact"
    if codes.mismatches:
        codes.detail = f"in {len(codes.mismatches)} layers; compared were {codes.detail}"
    scales.detail = f"{report.layers}, exact"
    if scales.mismatches:
        scales.detail = f"{len(scales.mismatches)} of {scales.detail}"
    report.add(codes)
    report.add(scales)
    return report


def verify_checkpoint(
    artifact: str | Path, reference: str | Path | Fingerprint, prompts: Sequence[str] = ()
) -> VerificationReport:
    """Check that a stored model, of any format that this package writes, is the model that trained.

    Codes and scales are compared exactly; all other tensors, the config and the tokenizer too where the
    reference has them. One tensor of each is in memory at a time.

    Args:
        artifact: a folder or a GGUF file.
        reference: a fingerprint, a run's output folder (its ``bitnet.json`` and its latents), that file, or
            another stored ternary model.
        prompts: texts to run both models on, where the format runs here; none, and nothing is run. Needs the
            memory of the larger of the two.

    Raises:
        CheckpointError: either cannot be read.
    """
    found = open_checkpoint(artifact)
    fingerprint, model, why = _read_reference(reference, found)
    try:
        codes = found.fingerprint()
    except CheckpointError as error:  # what no writer writes
        report = VerificationReport(len(fingerprint.tensors), digest=fingerprint.digest)
        report.add(Check("codes", "cannot be read", [str(error)]))
        return report
    report = compare(codes, fingerprint)
    if model is None:
        for name in ("other tensors", "config", "tokenizer", *(["running"] if prompts else [])):
            report.add(Check(name, why, done=False))
        return report
    _count_codes(report, found, model)
    for check in (compare_tensors, compare_config, compare_companions):
        report.add(check(found, model))
    if prompts and not report.mismatches:
        for result in compare_running(found, model, prompts):
            report.add(result)
    elif prompts:
        report.add(Check("running", "the stored models differ already", done=False))
    return report


_DIFFER = ": codes differ"


def _count_codes(report: VerificationReport, found: TernaryCheckpoint, model: TernaryCheckpoint) -> None:
    """Count the codes that differ in every layer that differs; a digest shows only that some do."""
    (codes,) = [check for check in report.checks if check.name == "codes"]
    total = 0
    for place, line in enumerate(codes.mismatches):
        if line.endswith(_DIFFER):
            name = line.removesuffix(_DIFFER)
            ours, theirs = found.codes(name)[0], model.codes(name)[0]
            count = int((ours != theirs).sum())
            total += count
            codes.mismatches[place] = f"{name}: {count:,} of {theirs.numel():,} codes differ"
            report.mismatches[report.mismatches.index(line)] = codes.mismatches[place]
    if total:
        codes.detail = f"{total:,} {codes.detail}"


def _read_reference(
    reference: str | Path | Fingerprint, artifact: TernaryCheckpoint
) -> tuple[Fingerprint, TernaryCheckpoint | None, str]:
    """A fingerprint, and its model; or why there is no model."""
    if isinstance(reference, Fingerprint):
        return reference, None, "only a fingerprint was given"
    path = Path(reference)
    run_file = path if path.suffix == ".json" else path / RUN_FILE
    own = path.resolve() == artifact.folder.resolve()
    if not run_file.exists():
        if own:
            raise CheckpointError(
                f"{path} is no reference for itself: name the run's folder or its latents (--against)"
            )
        model = open_checkpoint(path)
        return model.fingerprint(), model, ""
    try:
        fingerprint = Fingerprint.from_json(read_json(run_file)["fingerprint"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{run_file} holds no usable fingerprint: {error}") from error
    if own:
        return fingerprint, None, f"{run_file} holds the fingerprint only"
    try:
        return fingerprint, LatentCheckpoint(run_file.parent), ""
    except CheckpointError as error:
        return fingerprint, None, f"there are no latents to compare with: {error}"
