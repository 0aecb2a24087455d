"""Ternary models of third parties: no list of ternary layers in the config, and two meanings of a scale.

**Packed** (`quant_method: bitnet`): the bytes are those of :mod:`.packed`. onebitllms (Falcon-E) and
everything that names the class `bitlinear`, or none, divides by ``weight_scale``; Microsoft's `autobitlinear`
multiplies, so that ``s = bf16(1 / weight_scale)``. **Dense** (the "prequantized" Falcon3): one
magnitude a matrix.

The stored tensors show which layers are ternary. The architecture, built without weights from config.json and
from transformers' own code alone, shows which others are linear.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.entry import CONFIG_KEY
from ..model.layer_plan import ConversionError, Plan, plan_conversion
from ..model.preflight import NEVER_TERNARY, SAMPLE
from ..model.scales import lost, several_scales
from ..ops import ROWS_PER_BYTE, unpack_codes
from ..storage.atomic import CheckpointError
from ..storage.safetensors_stream import CheckpointReader, Entry
from ..ternary import dequantize, ternarize
from .checkpoint import TernaryCheckpoint
from .config_json import read_config
from .dense import DenseCheckpoint, read_signs
from .latent import LatentCheckpoint
from .recognize import recognize

_LOG = logging.getLogger(__name__)


class ThirdPartyPackedCheckpoint(TernaryCheckpoint):
    """A folder that another program packed. Scales are read as bfloat16.

    Raises:
        CheckpointError: it is not packed in a way known here, or a layer does more than the definition.
    """

    format = "third-party"

    def __init__(self, folder: str | Path, config: Mapping[str, Any] | None = None):
        self.folder = self.companions = Path(folder)
        path = self.folder / "config.json"
        config = read_config(self.folder, config)
        self._multiplies = multiplies(config, path)
        self._reader = CheckpointReader(self.folder)
        stored = self._reader.entries
        packed = [
            key.removesuffix(".weight")
            for key, entry in stored.items()
            if key.endswith(".weight") and entry.dtype == torch.uint8
        ]
        if not packed:
            raise CheckpointError(f"{self.folder} is packed by its config, but holds no uint8 weight")
        architecture = linear_layers(config, path)
        if strangers := sorted(set(packed) - set(architecture.converted)):
            raise CheckpointError(
                f"{self.folder}: '{strangers[0]}' is packed, but is no layer that becomes ternary in a "
                f"{config.get('model_type')} model ({len(strangers)} such layers)"
            )
        ternary = set(packed)
        for name in packed:
            weight, scale = stored[f"{name}.weight"], stored.get(f"{name}.weight_scale")
            if len(weight.shape) != 2 or scale is None or scale.shape not in ((1,), ()):
                raise CheckpointError(f"{self.folder}: '{name}' has no weight_scale of shape [1]")
            if self._multiplies and f"{name}.bias" in stored:
                raise CheckpointError(
                    f"{self.folder}: '{name}' has a bias, which `autobitlinear` scales with the weight"
                )
        self.names = split(architecture, ternary)
        self.config = with_names(config, self.names)
        self.keys = {name: f"{name}.weight" for name in self.names.converted}
        keys = set(self.keys.values())
        self.entries = {
            key: Entry(key, torch.bfloat16, (entry.shape[0] * ROWS_PER_BYTE, entry.shape[1]))
            if key in keys
            else entry
            for key, entry in stored.items()
            if key in keys or key.removesuffix("_scale") not in keys
        }
        self.settle_head()

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        key = self.keys[name]
        scale = self._reader.tensor(f"{key}_scale").to(torch.float32).reshape(1)
        s = scale.reciprocal() if self._multiplies else scale
        return unpack_codes(self._reader.tensor(key)), s.to(torch.bfloat16)

    def tensor(self, key: str) -> Tensor:
        return self._reader.tensor(key)


def open_unlisted(folder: str | Path, config: Mapping[str, Any] | None = None) -> DenseCheckpoint:
    """A dense ternary folder whose config does not list its layers. Reads all its matrices to find them.

    Raises:
        CheckpointError: none of its matrices is ternary.
    """
    path = Path(folder) / "config.json"
    config = read_config(Path(folder), config)
    architecture = linear_layers(config, path)
    reader = CheckpointReader(folder)
    ternary = {
        name
        for name in architecture.converted
        if _is_matrix(reader.entries.get(f"{name}.weight")) and read_signs(reader, f"{name}.weight")
    }
    if not ternary:
        told = [layout for name in architecture.converted if (layout := _layout(reader, f"{name}.weight"))]
        if told:
            raise CheckpointError(f"{folder} is {lost(', '.join(sorted(set(told))), len(told))}")
        raise CheckpointError(
            f"{folder} is not ternary: none of its {len(architecture.converted)} linear layers has a single "
            "magnitude. Latents need no restoring; a dense model becomes ternary by training"
        )
    names = split(architecture, ternary)
    return DenseCheckpoint(folder, names, with_names(config, names), reader)


class UnlistedCheckpoint(LatentCheckpoint):
    """A folder of floating-point matrices whose config lists no ternary layers: those that training would
    take are. A dense ternary matrix is read as its codes and scale, any other as latents. Microsoft's bf16
    BitNet, which transformers quantizes as it runs (`quantization_mode: online`), is one.

    Raises:
        CheckpointError: transformers does not know the architecture, its layers normalize inside, or as for
            :class:`LatentCheckpoint`.
    """

    format = "third-party"

    def __init__(self, folder: str | Path, config: Mapping[str, Any]):
        path = Path(folder) / "config.json"
        refuse_norms_inside(config, path)
        super().__init__(folder, with_names(config, linear_layers(config, path)))
        _LOG.warning(
            "%s lists no ternary layers: the %d that training would convert are taken. Codes are by this "
            "package's definition; a program with another (onebitllms rounds otherwise) may have had others",
            folder,
            len(self.names.converted),
        )
        several = [layout for key in self.keys.values() if (layout := _layout(self.reader, key))]
        changes = [change for key in self.keys.values() if (change := self._change(key)) is not None]
        if several:
            _LOG.warning("%s is %s", folder, lost(", ".join(sorted(set(several))), len(several)))
        elif changes and sum(changes) / len(changes) > NEVER_TERNARY:
            _LOG.warning(
                "%s may never have been ternary: quantization changes its matrices by %.0f %% on average",
                folder,
                100 * sum(changes) / len(changes),
            )

    def code_rows(self, name: str) -> tuple[Callable[[int, int], Tensor], Tensor]:
        found = read_signs(self.reader, self.keys[name])
        if found is None:
            return super().code_rows(name)
        codes, scale = found
        return (lambda start, stop: codes[start:stop]), scale

    def _change(self, key: str) -> float | None:
        sample = _sample(self.reader, key)
        if not bool(torch.isfinite(sample).all()) or not bool(sample.any()):
            return None
        size = sample.abs()
        if bool(((size == 0) | (size == size.amax())).all()):
            return 0.0
        return float((sample - dequantize(*ternarize(sample)[:2])).norm() / sample.norm())


def _sample(reader: CheckpointReader, key: str) -> Tensor:
    """The first rows of a matrix, float32, that measure it."""
    rows, columns = reader.entries[key].shape
    return reader.rows(key, 0, min(rows, max(1, SAMPLE // max(1, columns)))).to(torch.float32)


def _layout(reader: CheckpointReader, key: str) -> str | None:
    """How the several scales of a ternary matrix lie, by its first rows."""
    return several_scales(_sample(reader, key)) if _is_matrix(reader.entries.get(key)) else None


def linear_layers(config: Mapping[str, Any], path: Path) -> Plan:
    """The linear layers of the architecture that a config.json describes: those that conversion would make
    ternary, and the others. Builds the model without weights; runs no code but transformers' own.

    Raises:
        CheckpointError: transformers does not know the architecture, or it cannot be made ternary.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(f"{path}: transformers has no architecture '{kind}' of its own")
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind].from_dict(plain))
        return plan_conversion(model)
    except ConversionError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # whatever an edited config makes transformers raise
        raise CheckpointError(f"{path}: transformers cannot build this model: {error}") from error


def split(architecture: Plan, ternary: set[str]) -> Plan:
    """The architecture's layers, those not among ``ternary`` dense."""
    left = [name for name in architecture.converted if name not in ternary]
    return Plan([name for name in architecture.converted if name in ternary], architecture.dense + left)


def with_names(config: Mapping[str, Any], names: Plan) -> dict[str, Any]:
    """Another program's config as training would have saved it, without ``auto_map``: code of a hub
    repository is not copied."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    return kept | {CONFIG_KEY: names.to_entry()}


def multiplies(config: Mapping[str, Any], path: Path) -> bool:
    """Whether a packed model's layers multiply by weight_scale, rather than divide.

    Raises:
        CheckpointError: they do neither, or more than that.
    """
    found = recognize(config)
    if found.method != "bitnet":
        raise CheckpointError(f"{path} is not a packed BitNet model's (quant_method bitnet)")
    refuse_norms_inside(config, path)
    if found.linear_class not in ("bitlinear", "autobitlinear"):
        raise CheckpointError(f"{path} names an unknown linear_class '{found.linear_class}'")
    return found.linear_class == "autobitlinear"


def refuse_norms_inside(config: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError if the linear layers of a BitNet config hold an RMSNorm each."""
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping) and quantization.get("use_rms_norm"):
        raise CheckpointError(
            f"{path}: use_rms_norm: its layers normalize inside, for which no format here has a place"
        )


def _is_matrix(entry: Entry | None) -> bool:
    return entry is not None and entry.dtype.is_floating_point and len(entry.shape) == 2
