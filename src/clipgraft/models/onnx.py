"""Both towers as ONNX graphs, checked in ONNX Runtime against PyTorch before anybody gets to see them.

Plain towers are exported from their parts, so that batch and text length stay free. Others are
exported through their library's own forward, at the full context length.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.errors import ModelError
from clipgraft.files import write_json
from clipgraft.models.architecture import Activation, AttentionPool, Block, Linear, TextTower, VisionTower
from clipgraft.models.clip import Clip
from clipgraft.models.family import LARGEST_ID
from clipgraft.models.hub import one_line
from clipgraft.models.library_calls import quiet_libraries
from clipgraft.models.processors import cleaning_of, hf_tokenizer_files, image_settings
from clipgraft.models.sites import Site

DESCRIPTION = "clipgraft_onnx.json"
VERIFIED_TO = 1e-4
"""Largest accepted difference between ONNX Runtime and PyTorch, over the largest feature."""

_TEXT, _VISION = "text.onnx", "vision.onnx"
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_EMBEDDED_BYTES = 1 << 30
"""Graphs of more weights than this keep them in a file beside: protobuf ends at 2 GiB."""
_BATCHES = (1, 3)


def require_onnx() -> None:
    """Raise ModelError where the packages that write and check ONNX are not installed."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"ONNX needs {', '.join(missing)}: pip install 'clipgraft[onnx]'")


def write_onnx(clip: Clip, folder: Path, tell: Callable[[str], None]) -> dict[str, float]:
    """Write `text.onnx`, `vision.onnx`, `clipgraft_onnx.json` and the tokenizer into an empty folder.

    `text.onnx`: `input_ids` (B, L) int64 -> `text_features` (B, D); `vision.onnx`: `pixel_values` (B, 3, H,
    W) -> `image_features` (B, D). All fp32, whatever the model's type; features are not normalised.

    Returns:
        Of each graph the largest difference from PyTorch, over the largest feature.

    Raises:
        ModelError: a tower cannot be exported, or computes something else in ONNX Runtime.
    """
    clip.tokenize("")
    clip.require_preprocess()
    model = copy.deepcopy(clip.model).to("cpu", torch.float32).eval()
    exact = Clip(model, clip.family, clip.tokenizer, clip.preprocess, None, clip.source)
    text, vision = _TextGraph(exact), _VisionGraph(exact)
    differences = {}
    for file, graph in ((_TEXT, text), (_VISION, vision)):
        tell(f"exporting {file}")
        _export(graph, folder / file)
        differences[file] = _verify(graph, folder / file)
        tell(f"{file} agrees with PyTorch to {differences[file]:.1e} of the largest feature")
    tokenizer = hf_tokenizer_files(exact)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_json(folder / DESCRIPTION, _describe(exact, text, vision, differences))
    return differences


class _TextGraph(nn.Module):
    """What `text.onnx` computes, and inputs to trace and check it with."""

    input_name, output_name = "input_ids", "text_features"

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.model, self.clip = clip.model, clip
        self.free_length = (
            clip.family.text_tower(clip.model) is not None and clip.family.pooled_id(clip.model) is not None
        )
        embedding = clip.site_refs.get(Site("text", None, "token_embedding"))
        self.vocabulary = embedding.shape[0] if embedding is not None else 100

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) int64 -> (B, D)."""
        family = self.clip.family
        tower = family.text_tower(self.model) if self.free_length else None
        if tower is None:
            return family.encode_text(self.model, input_ids)
        ends = family.text_ends(self.model, input_ids)
        assert ends is not None
        return _text_features(tower, input_ids, ends)

    def sample(self, batch: int) -> Tensor:
        """Ids whose pooled token is at another place in each row, and again after it; some short if free."""
        length = self.clip.context_length
        if self.free_length and batch == _BATCHES[-1]:
            length = max(length // 2, 1)
        pooled = self.clip.family.pooled_id(self.model)
        end = self.vocabulary - 1 if pooled is None or pooled == LARGEST_ID else pooled
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(max(self.vocabulary - 1, 1), (batch, length), generator=generator)
        ids[ids == end] = 0
        for row in range(batch):
            ids[row, length - 1 - row * length // 4 :] = end
        return ids

    def dynamic(self) -> dict[int, Any]:
        sizes = {0: torch.export.Dim("batch")}
        if self.free_length:
            sizes[1] = torch.export.Dim("length", max=self.clip.context_length)
        return sizes

    def reference(self, input_ids: Tensor) -> Tensor:
        return self.clip.family.encode_text(self.model, input_ids)


class _VisionGraph(nn.Module):
    """What `vision.onnx` computes, and inputs to trace and check it with."""

    input_name, output_name = "pixel_values", "image_features"

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.model, self.clip = clip.model, clip

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        tower = self.clip.family.vision_tower(self.model)
        if tower is None:
            return self.reference(pixel_values)
        return _image_features(tower, pixel_values)

    def sample(self, batch: int) -> Tensor:
        """Pixels of about the range that normalised ones have."""
        size = self.clip.family.image_size(self.model)
        return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))

    def dynamic(self) -> dict[int, Any]:
        return {0: torch.export.Dim("batch")}

    def reference(self, pixel_values: Tensor) -> Tensor:
        return self.clip.family.encode_image(self.model, pixel_values)


def _export(graph: _TextGraph | _VisionGraph, path: Path) -> None:
    weights = sum(p.numel() * p.element_size() for p in graph.model.parameters())
    try:
        with quiet_libraries(), _own_kernels_off(), torch.no_grad():
            torch.onnx.export(
                graph,
                (graph.sample(2),),
                path,
                input_names=[graph.input_name],
                output_names=[graph.output_name],
                dynamic_shapes=(graph.dynamic(),),
                external_data=weights > _EMBEDDED_BYTES,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        raise ModelError(
            f"{path.name} cannot be exported: {one_line(error)}; this tower has to stay in PyTorch"
        ) from error


def _verify(graph: _TextGraph | _VisionGraph, path: Path) -> float:
    """The largest difference between ONNX Runtime and the library's own forward, over the largest feature."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in _BATCHES:
        inputs = graph.sample(batch)
        with torch.no_grad():
            wanted = graph.reference(inputs)
        (given,) = session.run([graph.output_name], {graph.input_name: inputs.numpy()})
        worst = max(worst, float((torch.from_numpy(given) - wanted).abs().max() / wanted.abs().max()))
    # Written so that NaN fails as well.
    if not worst <= VERIFIED_TO:
        raise ModelError(
            f"{path.name} differs from PyTorch by {worst:.1e} of the largest feature in ONNX Runtime, more "
            f"than {VERIFIED_TO:.0e}: use the model in PyTorch, or another version of onnxruntime"
        )
    return worst


def _describe(
    clip: Clip, text: _TextGraph, vision: _VisionGraph, differences: dict[str, float]
) -> dict[str, Any]:
    """What a program needs to know to use the graphs without clipgraft."""
    tokenizer = hf_tokenizer_files(clip)
    with torch.no_grad():
        dim = text.reference(text.sample(1)).shape[-1]
    settings, scale = image_settings(clip), clip.logit_scale.detach()
    return {
        "format": "clipgraft-onnx",
        "version": 1,
        "source": asdict(clip.source),
        "fingerprint": clip.fingerprint,
        "embedding_dim": dim,
        "features": "not normalised: divide each row by its Euclidean norm before comparing",
        "logit_scale": float(scale),
        "temperature": float(torch.exp(-scale)),
        **({} if clip.logit_bias is None else {"logit_bias": float(clip.logit_bias.detach())}),
        "largest_difference": differences,
        "text": {
            "file": _TEXT,
            "input": text.input_name,
            "input_type": "int64",
            "output": text.output_name,
            "context_length": clip.context_length,
            "shorter_texts": text.free_length,
            "tokenizer": None if tokenizer is None else "tokenizer.json",
            "pad_id": getattr(tokenizer, "pad_token_id", None),
            "open_clip_cleaning": cleaning_of(clip.tokenizer),
        },
        "vision": {
            "file": _VISION,
            "input": vision.input_name,
            "input_type": "float32",
            "output": vision.output_name,
            **({"size": clip.family.image_size(clip.model)} if settings is None else asdict(settings)),
        },
    }


@contextlib.contextmanager
def _own_kernels_off() -> Iterator[None]:
    """Trace attention as what it computes: the fast path of MultiheadAttention is one opaque operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# The forward of plain towers in a handful of operators: the libraries' own forwards take fast paths, build
# masks in Python and fix the length of texts.


def _text_features(tower: TextTower, tokens: Tensor, ends: Tensor) -> Tensor:
    """(N, L) int64 ids and the (N,) positions of their pooled tokens -> (N, D) features."""
    rows, length = tokens.shape
    x = F.embedding(tokens, tower.tokens.weight) + tower.positions.weight[:length]
    for block in tower.blocks:
        x = _block(block, x, tower.heads, causal=True)
    return _finish(tower, x[torch.arange(rows, device=tokens.device), ends])


def _image_features(tower: VisionTower, images: Tensor) -> Tensor:
    """(N, 3, H, W) pixels -> (N, D) features."""
    (patch,) = tower.patch
    patches = F.conv2d(images, patch.weight, patch.bias, stride=tower.patch_size).flatten(2).transpose(1, 2)
    x: Tensor = patches
    if tower.class_embedding is not None:
        x = torch.cat([tower.class_embedding.expand(patches.shape[0], 1, -1), x], dim=1)
    x = x + tower.positions.matrix
    if tower.norm_pre is not None:
        x = tower.norm_pre(x)
    for block in tower.blocks:
        x = _block(block, x, tower.heads, causal=False)
    return _finish(tower, x[:, 0]) if tower.pool is None else _pooled(tower.pool, tower.norm(x))


def _pooled(pool: AttentionPool, x: Tensor) -> Tensor:
    """(N, tokens, dim) norm of a tower -> (N, dim) features."""
    query = _linear(pool.q, pool.probe.reshape(1, 1, -1).expand(x.shape[0], 1, -1))
    q, k, v = (
        torch.unflatten(t, -1, (pool.heads, -1)).transpose(1, 2) for t in (query, *_stacked(pool.kv, x))
    )
    context = F.scaled_dot_product_attention(q, k, v)
    pooled = _linear(pool.out, context.transpose(1, 2).flatten(2))[:, 0]
    return pooled + _mlp(pool.norm(pooled), pool.fc1, pool.act, pool.fc2)


def _finish(tower: TextTower | VisionTower, pooled: Tensor) -> Tensor:
    normed: Tensor = tower.norm(pooled)
    return normed if tower.proj is None else _linear(tower.proj, normed)


def _block(block: Block, x: Tensor, heads: int, causal: bool) -> Tensor:
    q, k, v = (
        torch.unflatten(t, -1, (heads, -1)).transpose(1, 2) for t in _stacked(block.qkv, block.norm1(x))
    )
    context = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    x = x + _linear(block.out, context.transpose(1, 2).flatten(2))
    return x + _mlp(block.norm2(x), block.fc1, block.act, block.fc2)


def _mlp(x: Tensor, fc1: Linear, act: Activation, fc2: Linear) -> Tensor:
    inner = _linear(fc1, x)
    if act == "quick_gelu":
        inner = inner * torch.sigmoid(1.702 * inner)
    else:
        inner = F.gelu(inner, approximate="tanh" if act == "gelu_tanh" else "none")
    return _linear(fc2, inner)


def _stacked(parts: Linear, x: Tensor) -> tuple[Tensor, ...]:
    """What each part gives; one product where all of a weight is theirs."""
    weight = parts[0].weight
    if parts[0].rows is not None and sum(part.matrix.shape[0] for part in parts) == weight.shape[0]:
        return F.linear(x, weight, parts[0].bias).chunk(len(parts), dim=-1)
    return tuple(_linear((part,), x) for part in parts)


def _linear(parts: Linear, x: Tensor) -> Tensor:
    (part,) = parts
    return F.linear(x, part.matrix, part.offset)
