"""Sites: the places of a CLIP model that can carry a low-rank update, named alike in every family.

A site is `(tower, block, role)` and is written `text.3.q`, `vision.11.fc1`, `text.token_embedding`,
`vision.patch_embedding` or `vision.proj`. Targeting, adapter files, conversion and reports speak sites;
module paths are known to the family files alone.

Blocks are numbered through a tower's stages. Beside the roles of CLIP's own transformer there are those of

- gated MLPs: `gate`, the branch that multiplies `fc1`;
- convolutional blocks: `conv1`, `conv2`, `conv3` of a bottleneck, `conv_dw` (depthwise), `mixer` and
  `mixer_scale` (the token mixer of FastViT), `shortcut`, and `downsample` before the first block of a stage;
- attention pooling: `vision.pool_q` … `vision.pool_out`, and `vision.pool_fc1`, `vision.pool_fc2` of its MLP;
- projections of two layers: `vision.proj_fc1`, `vision.proj_fc2`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from clipgraft.errors import TargetError

Tower = Literal["text", "vision"]
SiteKind = Literal["linear", "rows", "fused", "read", "embedding", "conv", "projection", "table"]

TOWERS: tuple[Tower, ...] = ("text", "vision")
EMBEDDING_ROLES = ("token_embedding", "patch_embedding", "position_embedding")
ATTENTION_ROLES = ("q", "k", "v", "out")
MLP_ROLES = ("fc1", "fc2")
BLOCK_ROLES = (*ATTENTION_ROLES, *MLP_ROLES)
CONV_ROLES = ("downsample", "conv1", "conv2", "conv3", "conv_dw", "mixer", "mixer_scale", "shortcut")
POOL_ATTENTION_ROLES = tuple(f"pool_{role}" for role in ATTENTION_ROLES)
POOL_ROLES = (*POOL_ATTENTION_ROLES, *(f"pool_{role}" for role in MLP_ROLES))
PROJECTION_ROLES = ("proj_fc1", "proj_fc2", "proj")
ROLES_IN_BLOCKS = (*CONV_ROLES, *ATTENTION_ROLES, "fc1", "gate", "fc2")
ROLES = (*EMBEDDING_ROLES, *ROLES_IN_BLOCKS, *POOL_ROLES, *PROJECTION_ROLES)
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


def block_number(text: str) -> int | None:
    """A block's number as it is written in sites and module paths, without leading zeros; None for others."""
    return int(text) if _NUMBER.fullmatch(text) else None


@dataclass(frozen=True)
class Site:
    """One place for a low-rank update; `block` is None for embeddings and projections."""

    tower: Tower
    block: int | None
    role: str

    def __str__(self) -> str:
        parts = (self.tower, self.role) if self.block is None else (self.tower, str(self.block), self.role)
        return ".".join(parts)

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Sort key that follows the data through the model: embeddings, blocks, pooling, projection."""
        stage = 0 if self.role in EMBEDDING_ROLES else 2 if self.is_above_blocks else 1
        return TOWERS.index(self.tower), stage, self.block or 0, ROLES.index(self.role)

    @property
    def is_above_blocks(self) -> bool:
        """Whether it comes after the last block: pooling and projections."""
        return self.block is None and self.role not in EMBEDDING_ROLES

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read `text.3.q` or `vision.proj`; raises TargetError when it is not a site."""
        parts = text.split(".")
        if len(parts) in (2, 3) and parts[0] in TOWERS and parts[-1] in ROLES:
            tower: Tower = "text" if parts[0] == "text" else "vision"
            if len(parts) == 2 and parts[1] not in ROLES_IN_BLOCKS:
                return cls(tower, None, parts[1])
            block = block_number(parts[1])
            if len(parts) == 3 and parts[2] in ROLES_IN_BLOCKS and block is not None:
                return cls(tower, block, parts[2])
        raise TargetError(
            f"'{text}' is not a site: write text.3.q, vision.11.fc1, text.token_embedding or vision.proj"
        )


@dataclass(frozen=True)
class SiteRef:
    """Where one family keeps the weight of a site.

    Attributes:
        site: the site.
        module: dotted path of the module that owns the weight; "" is the model itself.
        parameter: name of the weight inside that module (dotted for a child's, `out_proj.weight`).
        kind: how the weight is used. `linear`, `embedding` and `conv` are modules that are called, and
            `rows` is a share of one, a Linear that computes several sites side by side; `fused` weights are
            read by an attention module that is rewritten (`clipgraft.lora.attention`), `read` weights by
            one that is not; `projection` is a raw (in, out) Parameter multiplied from the right; `table`
            is a (rows, dim) Parameter that is added, with leading dimensions of 1 or without.
        shape: canonical weight shape: (out, in) for linear, rows, fused, read and projection, (rows, dim)
            for embedding and table, (out, in / groups, height, width) for conv.
        rows: the rows of a weight of several sites that belong to this one.
        bias: dotted path of the site's own bias in the model, where it is no `bias` beside the weight.
    """

    site: Site
    module: str
    parameter: str
    kind: SiteKind
    shape: tuple[int, ...]
    rows: slice | None = None
    bias: str = ""

    def lora_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B at rank r, in PEFT's layout.

        Linear: (r, in), (out, r). Embedding: (r, rows), (dim, r). Conv: (r, in / groups, h, w) and
        (out, r, 1, 1).
        """
        if self.kind == "conv":
            out, *rest = self.shape
            return (r, *rest), (out, r, 1, 1)
        if self.kind in ("embedding", "table"):
            rows, dim = self.shape
            return (r, rows), (dim, r)
        out, inner = self.shape
        return (r, inner), (out, r)
