"""The keys of our entry in a converted model's config.json. Without torch, so that `plan` starts at once."""

from __future__ import annotations

CONFIG_KEY = "axolotl_bitnet"
"""Key of config.json under which a converted model lists its ternary and its dense linear layers: an entry
as :meth:`Plan.to_entry` makes it. ``ramp`` and ``format`` are added to it where they apply."""


RAMP_KEY = "ramp"
"""In that entry: lambda, while it is below 1 (:mod:`axolotl_bitnet.training.ramp`)."""


FORMAT_KEY = "format"
"""In that entry: how the ternary layers are stored, where nothing else in the config shows it."""
