"""The sizes of DiT that the literature names (arXiv 2212.09748, table 1; XS is arXiv 2509.17894's)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Depth, width and heads under the name the literature uses."""

    depth: int
    width: int
    heads: int


PRESETS: Mapping[str, Preset] = {
    "XS": Preset(6, 256, 4),
    "S": Preset(12, 384, 6),
    "B": Preset(12, 768, 12),
    "L": Preset(24, 1024, 16),
    "XL": Preset(28, 1152, 16),
}
PATCHES = (2, 4, 8)
