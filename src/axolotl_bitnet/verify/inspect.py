"""What a stored model is: latent, dense ternary, packed (by whose rule), an artifact of ours, or never
ternary; layer by layer, by blocks of rows. It takes third parties' folders too; code that comes with a model
is never run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..formats.checkpoint import TernaryCheckpoint
from ..formats.config_json import read_plan
from ..formats.export import open_checkpoint
from ..formats.gguf.reader import GGUFCheckpoint
from ..formats.recognize import recognize
from ..formats.registry import FORMATS
from ..formats.third_party import multiplies
from ..formats.unplaced import unplaced
from ..model.convert import convert_to_bitlinear
from ..model.entry import CONFIG_KEY
from ..model.layer_plan import ConversionError, Plan
from ..model.names import first_few, natural_order
from ..model.preflight import NEVER_TERNARY
from ..model.scales import lost, several_scales
from ..ops import ROWS_PER_BYTE, unpack_codes
from ..storage.atomic import CheckpointError, read_json
from ..storage.progress import begin
from ..storage.safetensors_stream import CheckpointReader, Entry
from .measure import Layer, measure, ternary_layer

_NOT_LINEAR = ("lm_head", "embed_out", "score", "classifier", "embed")


@dataclass
class Inspection:
    """What was found.

    Attributes:
        path: what was inspected.
        kind: "latents", "dense ternary", "packed", "never ternary", or a format of ours.
        detail: whose convention, and where the list of layers is from, in words.
        layers: see :class:`Layer`; in the order of their names, in which numbers count.
        bytes: size of the weights now.
        packed_bytes: their size packed to 2 bits, everything else in bfloat16.
        refused: what cannot be done with it, and why.
        unplaced: tensors that its architecture has no place for, and that are not loaded.
    """

    path: str
    kind: str
    detail: str
    layers: list[Layer] = field(default_factory=list)
    bytes: int = 0
    packed_bytes: int = 0
    refused: list[str] = field(default_factory=list)
    unplaced: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layers.sort(
            key=lambda layer: natural_order(layer.name)
        )  # formats store them in orders of their own

    @property
    def weights(self) -> int:
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "weights": self.weights}


def inspect(path: str | Path) -> Inspection:
    """Inspect a stored model.

    Args:
        path: a folder of safetensors with a config.json, or a GGUF file.

    Raises:
        CheckpointError: there is no model that can be read.
    """
    path = Path(path)
    config = read_json(path / "config.json") if (path / "config.json").exists() else None
    if config is None or recognize(config).kind == "mlx":
        return _artifact(path, open_checkpoint(path))
    reader = CheckpointReader(path)
    if any(entry.dtype == torch.uint8 for entry in reader.entries.values()):
        return _packed(path, reader, config)
    return _floating(path, reader, config)


def _artifact(path: Path, checkpoint: TernaryCheckpoint) -> Inspection:
    """A format that only this package's readers know."""
    kind = checkpoint.format
    detail = FORMATS[kind].title if kind in FORMATS else ""
    ternary = set(checkpoint.keys.values())
    size = _size(checkpoint.folder)
    rest = sum(entry.nbytes for key, entry in checkpoint.entries.items() if key not in ternary)
    average = (size - rest) * 8 / sum(checkpoint.entries[key].numel for key in ternary)
    bits = dict.fromkeys(ternary, average)
    if isinstance(checkpoint, GGUFCheckpoint):
        kinds = {key: checkpoint.kind(key) for key in sorted(ternary)}
        kind, detail = "GGUF", ", ".join(sorted(set(kinds.values())))
        detail += ", by axolotl-bitnet" if checkpoint.whole_config else ""
        bits = {key: checkpoint.bits(key) for key in kinds}
    layers = []
    for name in _told(checkpoint.names.converted, lambda name: checkpoint.entries[checkpoint.keys[name]]):
        layers.append(ternary_layer(name, bits[checkpoint.keys[name]], *checkpoint.codes(name)))
    refused = [f"training: it is quantized ({kind}); `axolotl-bitnet restore` makes latents of it"]
    packed = _packed_size(checkpoint.entries.values(), ternary)
    names = unplaced(checkpoint.config, checkpoint.entries)
    return Inspection(str(path), kind, detail, layers, size, packed, refused, names)


def _packed(path: Path, reader: CheckpointReader, config: dict[str, Any]) -> Inspection:
    """Matrices of uint8 with a weight_scale each, by which some layers divide and others multiply."""
    found = recognize(config)
    if found.method != "bitnet":
        raise CheckpointError(
            f"{path} holds uint8 matrices of the quantization '{found.method}', which is not BitNet's"
        )
    refused = [
        "training: it is packed to 2 bits, and training needs latents; `axolotl-bitnet restore` makes them"
    ]
    try:
        autobitlinear = multiplies(config, path / "config.json")
    except CheckpointError as error:
        autobitlinear = found.linear_class == "autobitlinear"
        refused.append(f"restoring: {error}")
    ours = found.kind == "packed" and not autobitlinear
    detail = (
        "transformers' autobitlinear: multiplies by weight_scale"
        if autobitlinear
        else ("transformers' bitlinear: divides by weight_scale" + (", by axolotl-bitnet" if ours else ""))
    )
    entries = reader.entries
    keys = [key for key, entry in entries.items() if entry.dtype == torch.uint8 and f"{key}_scale" in entries]
    layers = []
    for key in _told(keys, lambda key: entries[key]):
        stored = reader.tensor(f"{key}_scale").to(torch.float32).reshape(-1)[:1]
        scale = (1 / stored if autobitlinear else stored).to(torch.bfloat16)
        layers.append(
            ternary_layer(key.removesuffix(".weight"), 2.0, unpack_codes(reader.tensor(key)), scale)
        )
    size = sum(entry.nbytes for entry in entries.values())
    names = unplaced(config, entries)
    return Inspection(str(path), "packed", detail, layers, size, size, refused, names)


def _floating(path: Path, reader: CheckpointReader, config: dict[str, Any]) -> Inspection:
    """Matrices of floating point: latents, dense ternary or plain."""
    entries = reader.entries
    plan, told, refused = _plan(path, config, entries)
    found = recognize(config)
    if found.kind in ("packed", "third-party", "quantized"):
        refused.append(f"training: it is quantized already ({found.method})")
    keys = {f"{plan.stem(name, entries)}.weight": name for name in plan.converted}
    keys = {
        key: name
        for key, name in keys.items()
        if key in entries and len(entries[key].shape) == 2 and entries[key].dtype.is_floating_point
    }
    layers = [
        measure(keys[key], entries[key], lambda key=key: reader.row_blocks(key))  # type: ignore[misc]
        for key in _told(keys, lambda key: entries[key])
    ]
    broken = [layer.name for layer in layers if layer.change != layer.change]
    if broken:
        refused.append(f"training and packing: NaN or Inf in {first_few(broken)}")
    blocks = (next(reader.row_blocks(key)) for key in keys)
    several = [layout for block in blocks if (layout := several_scales(block))]
    kind, detail = _kind_of(layers, found.kind in ("latents", "dense"), several)
    for layer in layers:
        if layer.shape[0] % ROWS_PER_BYTE:
            refused.append(
                f"packing: {layer.name} has {layer.shape[0]} rows, not a multiple of {ROWS_PER_BYTE}"
            )
    size = sum(entry.nbytes for entry in entries.values())
    packed = _packed_size(entries.values(), set(keys))
    names = unplaced(config, entries)
    return Inspection(str(path), kind, f"{detail}; {told}", layers, size, packed, refused, names)


def _kind_of(layers: list[Layer], ours: bool, several: list[str]) -> tuple[str, str]:
    zero = [layer.name for layer in layers if layer.zeros == 1]
    layers = [layer for layer in layers if layer.zeros < 1]
    if not layers:
        return "never ternary", "no matrix that would become ternary" + ("; all are zero" if zero else "")
    if several:
        return "ternary with several scales", lost(", ".join(sorted(set(several))), len(several))
    kind, detail = _kind_of_others(layers, ours)
    return kind, detail + (f"; all zero: {first_few(zero)}" if zero else "")


def _kind_of_others(layers: list[Layer], ours: bool) -> tuple[str, str]:
    """Of the matrices that are not all zero; all-zero ones show nothing."""
    change = sum(layer.change for layer in layers) / len(layers)
    dense = sum(layer.change == 0 for layer in layers)
    moved = f"quantization changes its matrices by {change:.0%} on average"
    if dense == len(layers):
        return "dense ternary", "each matrix has one magnitude; quantizing it anew would shrink its scale"
    if ours:
        return "latents", f"trained by axolotl-bitnet, which leaves latents anywhere between codes; {moved}"
    mixed = f"; {dense} of {len(layers)} matrices have one magnitude" if dense else ""
    if change > NEVER_TERNARY:
        return "never ternary", moved + mixed
    return "latents", f"by its matrices: {moved}{mixed}"


def _plan(path: Path, config: dict[str, Any], entries: dict[str, Entry]) -> tuple[Plan, str, list[str]]:
    """Which layers are or would become ternary, where that is from, and what training would refuse.

    Without our list in the config the architecture is built on the meta device, from transformers' classes.
    """
    own = read_plan(config, path / "config.json") if CONFIG_KEY in config else None
    try:
        model = _on_meta(path)
    except Exception as error:  # an unknown type, a config of another version, code that we do not run
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        refused = [f"training: transformers cannot build this architecture without its own code ({reason})"]
        named = own or Plan([key.removesuffix(".weight") for key in entries if _looks_linear(key)], [])
        return named, "layers by the names of the tensors" if own is None else "layers by its config", refused
    head = model.get_output_embeddings()
    skip = []
    if own is not None:
        linear = dict(model.named_modules())
        skip = [name for name in own.dense if name in linear and linear[name] is not head]
    try:
        names = convert_to_bitlinear(model, skip)
    except ConversionError as error:
        named = own or Plan([key.removesuffix(".weight") for key in entries if _looks_linear(key)], [])
        return named, "layers by the names of the tensors", [f"training: {error}"]
    plan = own or Plan(names, [], getattr(model.config, CONFIG_KEY).get("saved_as", {}))
    return plan, "layers by its config" if own else "layers by its architecture", []


def _on_meta(path: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    if hasattr(config, "quantization_config"):  # the layers as they were before
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _looks_linear(key: str) -> bool:
    name = key.removesuffix(".weight")
    last = name.rsplit(".", 1)[-1]
    return key.endswith(".weight") and not any(word in last for word in _NOT_LINEAR)


def _packed_size(entries: Any, ternary: set[str]) -> int:
    """2 bits per ternary weight and a scale each; the rest in bfloat16."""
    total = 0
    for entry in entries:
        if entry.name in ternary:
            total += entry.numel // ROWS_PER_BYTE + 2
        else:
            total += entry.numel * 2 if entry.dtype.is_floating_point else entry.nbytes
    return total


def _size(path: Path) -> int:
    """Of the weights; a GGUF file's metadata is counted with them."""
    if path.is_file():
        return path.stat().st_size
    return sum(entry.nbytes for entry in CheckpointReader(path).entries.values())


def _told(keys: Any, entry: Callable[[Any], Entry]) -> Iterator[Any]:
    """The same keys, with each matrix announced as it is done."""
    keys = list(keys)
    advance = begin("reading", sum(entry(key).nbytes for key in keys))
    for key in keys:
        yield key
        advance(entry(key).nbytes)
