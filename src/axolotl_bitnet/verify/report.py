"""The result of a verification."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class VerificationError(RuntimeError):
    """An artifact is not the model that trained. The latents are safe; the message has their folder."""


@dataclass
class Check:
    """One comparison: what was compared, and where it differs.

    Attributes:
        name: "codes", "scales", "other tensors", "config", "tokenizer", ...
        detail: what was compared and how exactly; or why it was not.
        mismatches: one line per difference.
        done: False if there was nothing to compare with.
    """

    name: str
    detail: str
    mismatches: list[str] = field(default_factory=list)
    done: bool = True

    @property
    def verdict(self) -> str:
        """ "same", "differs" or "not checked"."""
        return "differs" if self.mismatches else "same" if self.done else "not checked"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "verdict": self.verdict,
            "detail": self.detail,
            "mismatches": self.mismatches,
        }


@dataclass
class VerificationReport:
    """What a comparison found.

    Attributes:
        layers: number of ternary layers compared.
        weights: number of ternary weights in them.
        mismatches: one line per difference, over all checks.
        digest: digest of the reference fingerprint.
        checks: each comparison.
    """

    layers: int = 0
    weights: int = 0
    mismatches: list[str] = field(default_factory=list)
    digest: str = ""
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.mismatches and self.layers > 0

    def add(self, check: Check) -> None:
        self.checks.append(check)
        self.mismatches += check.mismatches

    def summary(self) -> str:
        """One line for people: what was found same or different, then what was not checked."""
        if self.ok:
            counts = f"{self.layers} ternary layers, {self.weights:,} codes and {self.layers} scales"
            left = [check.name for check in self.checks if not check.done]
            if not left:
                return f"verified: {counts} are the trained ones"
            return f"codes and scales verified: {counts} are the trained ones; not checked: {', '.join(left)}"
        shown = "; ".join(self.mismatches[:5])
        more = f"; and {len(self.mismatches) - 5} more" if len(self.mismatches) > 5 else ""
        return f"NOT the trained model: {shown}{more}"

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "layers": self.layers,
            "weights": self.weights,
            "digest": self.digest,
            "checks": [check.to_json() for check in self.checks],
        }
