"""Sites of transformer towers that are not CLIP's own, found by what their modules are called.

Of transformers these are BERT, RoBERTa and XLM-R, the encoders of T5, mT5 and M2M100 (NLLB), DistilBERT,
MPNet, ViT and DINOv2, and the towers of CLIP; further timm's blocks and `nn.TransformerEncoderLayer`. What is
not listed here (types of tokens, biases by relative position, norms) carries no update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from clipgraft.models.family import base_parameter
from clipgraft.models.sites import Site, SiteKind, SiteRef, Tower

# Where a residual block keeps what.
PLACES: Mapping[str, str] = {
    # BERT, RoBERTa, XLM-R; MPNet; DistilBERT
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.attn.q": "q",
    "attention.attn.k": "k",
    "attention.attn.v": "v",
    "attention.attn.o": "out",
    "attention.output.dense": "out",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "attention.q_lin": "q",
    "attention.k_lin": "k",
    "attention.v_lin": "v",
    "attention.out_lin": "out",
    "ffn.lin1": "fc1",
    "ffn.lin2": "fc2",
    # the encoder of T5 and mT5, whose MLP is gated or not
    "layer.0.SelfAttention.q": "q",
    "layer.0.SelfAttention.k": "k",
    "layer.0.SelfAttention.v": "v",
    "layer.0.SelfAttention.o": "out",
    "layer.1.DenseReluDense.wi": "fc1",
    "layer.1.DenseReluDense.wi_0": "gate",
    "layer.1.DenseReluDense.wi_1": "fc1",
    "layer.1.DenseReluDense.wo": "fc2",
    # CLIP, M2M100, and gated MLPs as of Llama
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.out_proj": "out",
    "self_attn.o_proj": "out",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "fc1",
    "mlp.down_proj": "fc2",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "fc1": "fc1",
    "fc2": "fc2",
    # ViT, DeiT, BEiT and DINOv2, in transformers 5 and before
    "attention.q_proj": "q",
    "attention.k_proj": "k",
    "attention.v_proj": "v",
    "attention.o_proj": "out",
    "attention.attention.query": "q",
    "attention.attention.key": "k",
    "attention.attention.value": "v",
    # timm, torch
    "attn.proj": "out",
    "linear1": "fc1",
    "linear2": "fc2",
}
_FUSED_LINEAR = "attn.qkv"
_FUSED_ATTENTION = "self_attn"
# Below the owner of the list of blocks, or above it.
_EMBEDDINGS: Mapping[Tower, Mapping[str, str]] = {
    "text": {
        "embed_tokens": "token_embedding",
        "embeddings.word_embeddings": "token_embedding",
        "embeddings.token_embedding": "token_embedding",
        "token_embedding": "token_embedding",
        "embeddings.position_embeddings": "position_embedding",
        "embeddings.position_embedding": "position_embedding",
    },
    "vision": {
        "embeddings.patch_embeddings.projection": "patch_embedding",
        "embeddings.patch_embedding": "patch_embedding",
        "patch_embed.proj": "patch_embedding",
        "embeddings.position_embeddings": "position_embedding",
        "embeddings.position_embedding": "position_embedding",
        "pos_embed": "position_embedding",
    },
}
POOLER = {"pooler.dense": "pool_fc1"}
_KINDS: Mapping[type[nn.Module], SiteKind] = {nn.Linear: "linear", nn.Conv2d: "conv"}


def encoder_refs(
    owner: nn.Module, prefix: str, tower: Tower, places: Mapping[str, str] = PLACES
) -> list[SiteRef]:
    """Find the sites of a tower, in the order of the data flow: embeddings, blocks, and the pooler.

    Args:
        owner: the tower, or a module that holds it.
        prefix: where `owner` lies in its model; "" for the model itself.
        tower: which one it is.
        places: the role of each module of a block, by its path in the block.
    """
    refs = {ref.site: ref for ref in _embeddings(owner, prefix, tower, places)}
    for number, path in enumerate(block_paths(owner, places)):
        refs |= {ref.site: ref for ref in _block(owner, path, prefix, Site(tower, number, ""), places)}
    for path, role in POOLER.items():
        refs |= {ref.site: ref for ref in module_ref(owner, path, prefix, Site(tower, None, role))}
    return sorted(refs.values(), key=lambda ref: ref.site.order)


def block_paths(owner: nn.Module, places: Mapping[str, str] = PLACES) -> list[str]:
    """Paths of the residual blocks from input to output: items of lists that hold a known place.

    Blocks of a decoder are none: a tower is an encoder.
    """
    lists = (nn.Sequential, nn.ModuleList)
    return [
        name
        for name, module in owner.named_modules()
        if name
        and "decoder" not in name.split(".")
        and isinstance(owner.get_submodule(name.rpartition(".")[0]), lists)
        and _is_block(module, places)
    ]


def encoder_groups(owner: nn.Module, last: Sequence[nn.Module | None] = ()) -> list[list[nn.Parameter]]:
    """The parameters of a tower from input to output: embeddings, each block, and `last`, its projections.

    What follows the blocks, norms and pooler, belongs to the last of them. One group where no block is found.
    """
    late = [p for module in last if module is not None for p in module.parameters()]
    blocks = [list(owner.get_submodule(path).parameters()) for path in block_paths(owner)]
    if not blocks:
        return [group for group in (list(owner.parameters()), late) if group]
    numbers = {id(p): number for number, block in enumerate(blocks, 1) for p in block}
    groups: list[list[nn.Parameter]] = [[] for _ in range(len(blocks) + 2)]
    final, current = {id(p) for p in late}, 0
    for parameter in owner.parameters():
        if id(parameter) not in final:
            # Parameters are registered in the order of the data flow, so that what has no number follows.
            current = numbers.get(id(parameter), len(blocks) if current else 0)
            groups[current].append(parameter)
    groups[-1] = late
    return [group for group in groups if group]


def module_ref(owner: nn.Module, path: str, prefix: str, site: Site) -> Iterator[SiteRef]:
    """The reference to a plain Linear, convolution, embedding or table of positions, if that is there."""
    holder, _, name = path.rpartition(".")
    try:
        module: Any = getattr(owner.get_submodule(holder), name)
    except AttributeError:
        return
    if not isinstance(module, nn.Module):
        if isinstance(module, nn.Parameter) or name in _parametrized(owner.get_submodule(holder)):
            yield from _table(owner.get_submodule(holder), _joined(prefix, holder), name, site)
        return
    kind = _kind(module)
    if kind is not None:
        shape = tuple(base_parameter(module, "weight").shape)
        yield SiteRef(site, _joined(prefix, path), "weight", kind, shape)


def _kind(module: nn.Module) -> SiteKind | None:
    # torch gives a parametrised module a class of its own, below the one it had.
    kind = type(module).__mro__[1] if hasattr(module, "parametrizations") else type(module)
    if kind is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")):
        return "embedding"
    if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return None
    return _KINDS.get(kind)


def _parametrized(module: nn.Module) -> Sequence[str]:
    return list(getattr(module, "parametrizations", ()))


def _table(holder: nn.Module, module: str, name: str, site: Site) -> Iterator[SiteRef]:
    """A Parameter of positions that is added: (rows, dim), or (1, rows, dim)."""
    shape = tuple(base_parameter(holder, name).shape)
    if len(shape) == 2 or (len(shape) == 3 and shape[0] == 1):
        yield SiteRef(site, module, name, "table", shape[-2:])


def _embeddings(owner: nn.Module, prefix: str, tower: Tower, places: Mapping[str, str]) -> Iterator[SiteRef]:
    """The tables of a tower, beside its list of blocks or above it, the nearest of each."""
    blocks = block_paths(owner, places)
    above = blocks[0].split(".")[:-2] if blocks else []
    ancestors = [".".join(above[:depth]) for depth in range(len(above), -1, -1)]
    found: set[str] = set()
    for ancestor in ancestors:
        for path, role in _EMBEDDINGS[tower].items():
            refs = list(module_ref(owner, _joined(ancestor, path), prefix, Site(tower, None, role)))
            if refs and role not in found:
                found.add(role)
                yield from refs


def _is_block(module: nn.Module, places: Mapping[str, str]) -> bool:
    if _attention(module) is not None or _fused(module) is not None:
        return True
    return any(list(module_ref(module, path, "", Site("text", 0, role))) for path, role in places.items())


def _block(
    owner: nn.Module, path: str, prefix: str, site: Site, places: Mapping[str, str]
) -> Iterator[SiteRef]:
    block, where = owner.get_submodule(path), _joined(prefix, path)
    for place, role in places.items():
        yield from module_ref(block, place, where, Site(site.tower, site.block, role))
    attention, fused = _attention(block), _fused(block)
    weight = "in_proj_weight" if attention is not None else "weight"
    host = attention if attention is not None else fused
    if host is None:
        return
    module = f"{where}.{_FUSED_ATTENTION if attention is not None else _FUSED_LINEAR}"
    kind: SiteKind = "fused" if attention is not None else "rows"
    out, inner = base_parameter(host, weight).shape
    for position, role in enumerate("qkv"):
        rows = slice(position * out // 3, (position + 1) * out // 3)
        yield SiteRef(Site(site.tower, site.block, role), module, weight, kind, (out // 3, inner), rows)
    if attention is not None:
        shape = tuple(attention.out_proj.weight.shape)
        yield SiteRef(Site(site.tower, site.block, "out"), module, "out_proj.weight", "fused", shape)


def _attention(block: nn.Module) -> nn.MultiheadAttention | None:
    """torch's attention with q, k and v in one weight, as `nn.TransformerEncoderLayer` has it."""
    attention = getattr(block, _FUSED_ATTENTION, None)
    known = isinstance(attention, nn.MultiheadAttention) and attention.in_proj_weight is not None
    return attention if known else None


def _fused(block: nn.Module) -> nn.Linear | None:
    """timm's Linear of q, k and v, side by side."""
    attention = getattr(block, "attn", None)
    fused, inner = getattr(attention, "qkv", None), getattr(attention, "proj", None)
    if not isinstance(fused, nn.Linear) or not isinstance(inner, nn.Linear):
        return None
    return fused if fused.out_features == 3 * inner.in_features else None


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)
