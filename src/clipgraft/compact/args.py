"""Options of making a model smaller."""

from __future__ import annotations

from pydantic import Field

from clipgraft.options import Blocks, Layers, Options, Tokens


class CompactArgs(Options):
    """What of a model stays."""

    text_layers: Layers | None = Field(
        None, description="number of text blocks to keep, evenly spread, including the first and the last"
    )
    vision_layers: Layers | None = Field(None, description="the same for the vision tower")
    text_blocks: Blocks | None = Field(None, description="text blocks to keep, by number: 0,5,11")
    vision_blocks: Blocks | None = Field(None, description="the same for the vision tower")
    vocab_size: Tokens | None = Field(
        None,
        ge=1,
        description="number of tokens to keep: those of `texts`, then the base's first merges",
    )
    vocab_lossy: bool = Field(
        False, description="if `texts` has more than `vocab_size`, keep the most frequent"
    )
