"""Convert a model of open_clip 3.x to the layout of 4.x, whose blocks use open_clip's own fused attention.

Both releases cannot be installed at once. The converted model has the same weights under the same names,
calls `out_proj` as a module, and passes masks and inputs as 4.x does.
"""

from __future__ import annotations

import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn


class FusedAttention(nn.Module):
    """Batch-first attention with one (3·dim, dim) input weight and a called output projection."""

    def __init__(self, stock: nn.MultiheadAttention) -> None:
        """Take over the Parameters of an `nn.MultiheadAttention`, without copying."""
        super().__init__()
        self.num_heads = stock.num_heads
        self.head_dim = stock.head_dim
        self.scale = stock.head_dim**-0.5
        self.use_sdpa = True
        self.in_proj_weight = stock.in_proj_weight
        self.in_proj_bias = stock.in_proj_bias
        self.out_proj = nn.Linear(stock.embed_dim, stock.embed_dim)
        self.out_proj.weight, self.out_proj.bias = stock.out_proj.weight, stock.out_proj.bias
        self.ln_q, self.ln_k, self.ln_inner = nn.Identity(), nn.Identity(), nn.Identity()
        self.logit_scale = self.head_scale = None
        self.attn_drop, self.out_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(
        self,
        x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """(N, L, dim) -> (N, L, dim); the mask is added to the scores."""
        inputs = (x, x if k_x is None else k_x, x if v_x is None else v_x)
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(t, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t, w, b in zip(inputs, weights, biases, strict=True)
        )
        context = F.scaled_dot_product_attention(
            self.ln_q(q), self.ln_k(k), v, attn_mask, self.attn_drop.p if self.training else 0.0
        )
        return self.out_drop(self.out_proj(self.ln_inner(context.transpose(1, 2).flatten(2))))


class Block4x(ResidualAttentionBlock):
    """A block that calls its attention as 4.x does: key and value always passed, one tensor returned."""

    def attention(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """(N, L, dim) -> (N, L, dim)."""
        k_x, v_x = (q_x if t is None else t for t in (k_x, v_x))
        mask = None if attn_mask is None else attn_mask.to(q_x.dtype)
        return self.attn(q_x, k_x=k_x, v_x=v_x, attn_mask=mask)


def to_4x(model: nn.Module) -> nn.Module:
    """Convert an open_clip 3.x model to the 4.x layout in place; state-dict names do not change."""
    for block in [module for module in model.modules() if isinstance(module, ResidualAttentionBlock)]:
        block.attn = FusedAttention(block.attn)
        block.__class__ = Block4x
    return model
