"""Compute W + s·B·A in plain torch: the reference for every way of running an adapter.

Nothing here asks clipgraft where a weight is stored or how an update is computed. Names, orientation and the
formula are written a second time, so that a mistake in one of them shows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from clipgraft.lora.state import require_lora

TEXT_ROLES = ("token_embedding", "position_embedding", "q", "k", "v", "out", "fc1", "fc2", "proj")
VISION_ROLES = ("patch_embedding", "position_embedding", "q", "k", "v", "out", "fc1", "fc2", "proj")
ROLES = [f"text.{role}" for role in TEXT_ROLES] + [f"vision.{role}" for role in VISION_ROLES]
BLOCK_ROLES = ("q", "k", "v", "out", "fc1", "fc2")
CONTEXT_END = 49407  # open_clip pools at the largest id
HF_END = 99

_HF_BLOCK = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_OPENCLIP_BLOCK = {
    "q": "attn.in_proj_weight",
    "k": "attn.in_proj_weight",
    "v": "attn.in_proj_weight",
    "out": "attn.out_proj.weight",
    "fc1": "mlp.c_fc.weight",
    "fc2": "mlp.c_proj.weight",
}
Update = tuple[Tensor, Tensor, float]


def is_hf(model: nn.Module) -> bool:
    """Tell whether a model is from transformers rather than from open_clip."""
    return hasattr(model, "text_model")


def custom_text(config: Mapping[str, Any], **text: Any) -> nn.Module:
    """Build a `CustomTextCLIP`, whose text tower is a module of its own, from an open_clip configuration."""
    config = copy.deepcopy(dict(config))
    config["text_cfg"].update(text)
    torch.manual_seed(0)
    return open_clip.CustomTextCLIP(**config).eval()


def target(site_role: str) -> str:
    """Turn `text.q` into the target expression for that role in all blocks, `text.*.q`."""
    tower, role = site_role.split(".")
    return f"{tower}.*.{role}" if role in BLOCK_ROLES else site_role


def inputs(model: nn.Module, batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make (N, 3, 32, 32) pixels and (N, context) ids; every row of ids ends at another position."""
    generator = torch.Generator().manual_seed(seed)
    length, vocabulary, end = (16, 98, HF_END) if is_hf(model) else (77, 49000, CONTEXT_END)
    ids = torch.randint(1, vocabulary, (batch, length), generator=generator)
    for row in range(batch):
        ids[row, 5 + row :] = 0
        ids[row, 5 + row] = end
    return torch.randn(batch, 3, 32, 32, generator=generator), ids


def features(model: nn.Module, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute image and text features with the model's own public functions, not normalised."""
    dtype = next(p.dtype for p in model.parameters() if p.ndim == 4)
    if is_hf(model):
        image = model.get_image_features(pixel_values=pixels.to(dtype)).pooler_output
        return image, model.get_text_features(input_ids=ids).pooler_output
    return model.encode_image(pixels.to(dtype)), model.encode_text(ids)


def weight_name(model: nn.Module, site: str) -> str:
    """Name the state-dict entry that holds a site's weight, in a model without adapters."""
    tower, *block, role = site.split(".")
    if is_hf(model):
        if role == "proj":
            return "text_projection.weight" if tower == "text" else "visual_projection.weight"
        if not block:
            return f"{tower}_model.embeddings.{role}.weight"
        return f"{tower}_model.encoder.layers.{block[0]}.{_HF_BLOCK[role]}.weight"
    own_text = "text." if isinstance(getattr(model, "text", None), nn.Module) else ""
    owner = own_text if tower == "text" else "visual."
    if block:
        return f"{owner}transformer.resblocks.{block[0]}.{_OPENCLIP_BLOCK[role]}"
    if role == "proj":
        linear = own_text and isinstance(model.text.text_projection, nn.Linear)
        return f"{owner}text_projection{'.weight' if linear else ''}" if tower == "text" else "visual.proj"
    names = {
        "token_embedding": "token_embedding.weight",
        "position_embedding": "positional_embedding",
        "patch_embedding": "conv1.weight",
    }
    return owner + names[role]


def explicit_weights(base: nn.Module, updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """Compute W + s·B·A for every weight that has an update, differentiable in A and B.

    The base's weights are converted to fp32 first, the type of the updates.
    """
    state = {name: weight.detach().float() for name, weight in base.state_dict().items()}
    changed: dict[str, Tensor] = {}
    for site, (a, b, scale) in updates.items():
        role, name = site.split(".")[-1], weight_name(base, site)
        weight = changed.get(name, state[name])
        if role == "patch_embedding":
            delta = scale * torch.einsum("or,rchw->ochw", b[:, :, 0, 0], a)
        elif role.endswith("embedding") or (role == "proj" and not name.endswith(".weight")):
            delta = scale * (b @ a).T
        else:
            delta = scale * (b @ a)
        if name.endswith("in_proj_weight"):
            parts = list(weight.chunk(3))
            index = "qkv".index(role)
            parts[index] = parts[index] + delta
            changed[name] = torch.cat(parts)
        else:
            changed[name] = weight + delta
    return changed


def explicit_model(base: nn.Module, updates: Mapping[str, Update]) -> nn.Module:
    """Copy the base and write W + s·B·A into its weights."""
    model = copy.deepcopy(base).float()
    with torch.no_grad():
        for name, weight in explicit_weights(base, updates).items():
            model.get_parameter(name).copy_(weight)
    return model


def explicit_run(
    base: nn.Module, updates: Mapping[str, Update], run: Callable[[nn.Module], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Call `run` on the model with weights W + s·B·A, with a graph back to A and B."""
    from torch.func import functional_call

    weights = {f"model.{name}": weight for name, weight in explicit_weights(base, updates).items()}
    outputs: tuple[Tensor, Tensor] = functional_call(_Runner(base, run), weights, ())
    return outputs


class _Runner(nn.Module):
    """Make `run` a forward, as `functional_call` replaces weights only during a forward."""

    def __init__(self, model: nn.Module, run: Callable[[nn.Module], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.run(self.model)


def randomise_lora(model: nn.Module, seed: int = 0, size: float = 0.3) -> dict[str, Update]:
    """Set every A and B of a model to random values; returns detached fp32 copies with their scales."""
    generator = torch.Generator().manual_seed(seed)
    updates: dict[str, Update] = {}
    for site, layer in require_lora(model).layers.items():
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)
        a, b = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
        updates[str(site)] = (a, b, layer.scaling)
    return updates


def largest(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    """Return the largest absolute difference between two tuples of tensors."""
    return max((a.float() - b.float()).abs().max().item() for a, b in zip(one, other, strict=True))


def loss_of(outputs: tuple[Tensor, Tensor]) -> Tensor:
    """Sum all features, each times another weight."""
    weights = (torch.linspace(-1, 1, t.numel()).reshape(t.shape) for t in outputs)
    return sum((t.float() * w).mean() for t, w in zip(outputs, weights, strict=True))


def randomise_active(model: nn.Module, seed: int = 0) -> None:
    """Move everything that trains, whatever its kind, by random amounts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                change = torch.randn(parameter.shape, generator=generator)
                parameter.add_(change.to(parameter.device), alpha=0.2)


def run(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Features of a few fixed inputs."""
    with torch.no_grad():
        return features(model, *inputs(model))


def bound(wanted: tuple[Tensor, ...], share: float = 1e-5) -> float:
    """What `largest` may be: a share of the largest feature, or of 1."""
    return share * max(1.0, *(t.abs().max().item() for t in wanted))
