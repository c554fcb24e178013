"""Readers of weights: checkpoints, adapters of every format, class heads, model configurations."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from safetensors.torch import save_file
from torch import Tensor

from clipgraft.adapters.adapter_file import AdapterFile, parts_of
from clipgraft.adapters.clip_lora import write_clip_lora
from clipgraft.adapters.convert import detect, read_any
from clipgraft.adapters.folder import write_adapter
from clipgraft.adapters.guide_format import write_guide
from clipgraft.evaluate.head import Head, load_head, save_head
from clipgraft.lora.config import LoraConfig
from clipgraft.models.load import load_config, with_weights
from clipgraft.models.load_hf import load_hf
from clipgraft.models.sites import Site
from clipgraft.train.checkpoint import Position, load_checkpoint, recorded_settings, save_checkpoint
from fuzz.mutate import damaged, junk, odd, odd_json
from fuzz.subject import Subject

WIDTH, RANK = 8, 2
TINY = {
    "embed_dim": 4,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 8, "head_width": 4, "layers": 1},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    "init_logit_bias": None,
}


def tensors(rng: Random) -> Any:
    """Return something that is no ordinary fp32 matrix, or a plain value."""
    strange: tuple[Callable[[], Any], ...] = (
        lambda: torch.zeros(()),
        lambda: torch.zeros(0, 3),
        lambda: torch.ones(2, 3, 4),
        lambda: torch.ones(RANK, WIDTH, dtype=torch.int64),
        lambda: torch.ones(RANK, WIDTH, dtype=torch.complex64),
        lambda: torch.ones(RANK, WIDTH, dtype=torch.float64),
        lambda: torch.full((RANK, WIDTH), float("nan")),
        lambda: torch.ones(1).expand(10**6, 10**6),
        lambda: torch.ones(RANK, WIDTH).to_sparse(),
        lambda: torch.empty(RANK, WIDTH, device="meta"),
        lambda: torch.ones(WIDTH, RANK).T,
        lambda: torch.nn.Parameter(torch.ones(RANK, WIDTH)),
        lambda: torch.zeros(3, dtype=torch.uint8),
        lambda: b"\0",
        lambda: {1: 2},
        lambda: (1, [2]),
        lambda: torch.float16,
        lambda: {1.5, "a"},
    )
    return rng.choice(strange)() if rng.random() < 0.5 else junk(rng)


def pt(value: dict[str, Any], path: Path) -> Callable[[Random], None]:
    """Damage a `torch.save` file: its values, the pickle inside a valid archive, or its bytes."""
    whole = _saved(value)

    def change(rng: Random) -> None:
        kind = rng.random()
        if kind < 0.6:
            path.write_bytes(_saved(odd(value, rng, tensors)))
        elif kind < 0.8:
            path.write_bytes(_repacked(whole, rng))
        else:
            path.write_bytes(damaged(whole, rng))

    return change


def _saved(value: Any) -> bytes:
    sink = io.BytesIO()
    try:
        torch.save(value, sink)
    except Exception:  # a value that torch cannot write either
        return b"PK\x03\x04"
    return sink.getvalue()


def _repacked(whole: bytes, rng: Random) -> bytes:
    """Write the archive again with one damaged part and a matching checksum."""
    sink = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(sink, "w") as new:
        names = old.namelist()
        wrong = rng.choice(
            [name for name in names if name.endswith("data.pkl")] if rng.random() < 0.7 else names
        )
        for name in names:
            content = old.read(name)
            new.writestr(name, damaged(content, rng) if name == wrong else content)
    return sink.getvalue()


def latest(folder: Path) -> Subject:
    """Damage checkpoints of a run."""
    folder.mkdir()
    path, settings = folder / "latest.pt", {"lr": 1e-3, "batch_size": 4, "model": "emoji"}
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    save_checkpoint(path, model, optimizer, Position(1, 2, 3), settings)

    def read() -> object:
        try:
            load_checkpoint(path, model, optimizer, settings)
        finally:
            recorded_settings(path)
        # What has been loaded must also be of use.
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        return torch.rand(1)

    value = torch.load(path, weights_only=True)
    return Subject(folder, read, [pt(value, path)], (path.name,))


def make_adapter(folder: Path) -> AdapterFile:
    generator = torch.Generator().manual_seed(0)

    def pair() -> tuple[Tensor, Tensor]:
        return torch.randn(RANK, WIDTH, generator=generator), torch.randn(WIDTH, RANK, generator=generator)

    weights = {Site("text", block, role): pair() for block in range(2) for role in ("q", "v")}
    settings = LoraConfig(r=RANK, alpha=4, targets="text-attention")
    base = {"name": "ViT-B-32", "pretrained": "openai", "family": "open_clip"}
    return AdapterFile(
        folder, parts_of(weights), settings, base=base, fingerprint="0123456789abcdef", metrics={"R@1": 0.5}
    )


def _read(path: Path) -> None:
    try:
        detect(path)
    finally:
        read_any(path, text_layers=12, vision_layers=12)


def guide(folder: Path) -> Subject:
    """Damage the guide's adapters, single `.pt` files."""
    folder.mkdir()
    path = write_guide(make_adapter(folder), folder / "a.pt")
    value = torch.load(path, weights_only=True)
    return Subject(folder, partial(_read, path), [pt(value, path)], (path.name,))


def clip_lora(folder: Path) -> Subject:
    """Damage adapters of MaxZanella/CLIP-LoRA."""
    folder.mkdir()
    path = write_clip_lora(make_adapter(folder), folder / "a.pt", 12, 12)
    value = torch.load(path, weights_only=True)
    return Subject(folder, partial(_read, path), [pt(value, path)], (path.name,))


def adapter(folder: Path) -> Subject:
    """Damage adapter folders of clipgraft and of PEFT: either JSON file, or the weights."""
    write_adapter(make_adapter(folder), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"rank_pattern": {"text_model.encoder.layers.0.self_attn.q_proj": RANK}}
    record = json.loads((folder / "clipgraft.json").read_text())
    weights = (folder / "adapter_model.safetensors").read_bytes()

    def alone(rng: Random) -> None:
        (folder / "clipgraft.json").unlink()
        (folder / "adapter_config.json").write_bytes(odd_json(config, rng))

    def odd_tensors(rng: Random) -> None:
        if rng.random() < 0.7:
            (folder / "clipgraft.json").unlink()
        (folder / "adapter_model.safetensors").write_bytes(_odd_safetensors(weights, rng))

    breaks: list[Callable[[Random], None]] = [
        lambda rng: _put(folder / "clipgraft.json", odd_json(record, rng)),
        lambda rng: _put(folder / "adapter_config.json", odd_json(config, rng)),
        alone,
        odd_tensors,
    ]
    return Subject(folder, partial(_read, folder), breaks)


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _odd_safetensors(content: bytes, rng: Random) -> bytes:
    """Write wrong values in a header whose length matches, or wrong bytes."""
    if rng.random() < 0.3:
        return damaged(content, rng)
    size = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + size])
    if rng.random() < 0.3:
        name = rng.choice([key for key in head if key != "__metadata__"])
        dtype = rng.choice((torch.int8, torch.float16))
        saved: bytes = save_tensors({name: torch.ones(RANK, WIDTH, dtype=dtype)})
        return saved
    line = odd_json(head, rng)
    return len(line).to_bytes(8, "little") + line + content[8 + size :]


def heads(folder: Path) -> Subject:
    """Damage classifiers on image features."""
    folder.mkdir()
    save_head(Head("linear", torch.eye(3, 4), 10.0), ["a", "b", "c"], folder)
    value = json.loads((folder / "classes.json").read_text())
    weights = (folder / "head.safetensors").read_bytes()

    def strange(rng: Random) -> None:
        shapes: tuple[Any, ...] = (torch.zeros(()), torch.ones(3), torch.ones(2, 4), torch.ones(3, 4).long())
        made = {"weight": torch.eye(3, 4), "scale": torch.tensor(1.0), "bias": torch.zeros(3)}
        made[rng.choice(list(made))] = rng.choice(shapes)
        save_file(made, folder / "head.safetensors")

    breaks: list[Callable[[Random], None]] = [
        lambda rng: _put(folder / "classes.json", odd_json(value, rng)),
        lambda rng: _put(folder / "head.safetensors", _odd_safetensors(weights, rng)),
        strange,
    ]
    return Subject(folder, partial(load_head, folder), breaks)


def configs(folder: Path) -> Subject:
    """Damage open_clip's model configurations; most are refused before anything is built."""
    folder.mkdir()
    path = folder / "m.json"
    path.write_text(json.dumps(TINY))
    small = {**TINY, "text_cfg": {**TINY["text_cfg"], "vocab_size": 50}}  # type: ignore[dict-item]

    def read() -> object:
        return load_config(path, "none", 0)

    return Subject(folder, read, [lambda rng: _put(path, odd_json(small, rng))], (path.name,))


def checkpoints(folder: Path) -> Subject:
    """Damage checkpoints of bases, as different training loops wrap them."""
    folder.mkdir()
    clip, path = load_config(_small_config(folder), "none", 0), folder / "w.pt"
    state = {f"model.{name}": weight for name, weight in _small_model().state_dict().items()}
    few = dict(list(state.items())[-12:])
    value = {"state_dict": state, "epoch": 1}
    whole = pt(value, path)
    _put(path, _saved(value))

    def named(rng: Random) -> None:
        # Most mutations of so many names would leave the rest as it is.
        changed = odd({"state_dict": few, "ema": few}, rng, tensors)
        inner = changed.get("state_dict") if isinstance(changed, dict) else None
        _put(
            path,
            _saved({**changed, "state_dict": {**state, **inner}} if isinstance(inner, dict) else changed),
        )

    return Subject(folder, partial(with_weights, clip, str(path)), [whole, named, named], (path.name,))


def archives(folder: Path) -> Subject:
    """Damage the pickle and the sizes of TorchScript archives."""
    folder.mkdir()
    clip, path = load_config(_small_config(folder), "none", 0), folder / "w.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(_small_model()), path)
    whole = path.read_bytes()

    def change(rng: Random) -> None:
        _put(path, _repacked(whole, rng) if rng.random() < 0.8 else damaged(whole, rng))

    return Subject(folder, partial(with_weights, clip, str(path)), [change], (path.name,))


def hf_folders(folder: Path) -> Subject:
    """Damage any file of a transformers folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder.mkdir()
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 10, "max_position_embeddings": 8},
        vision_config={**tower, "image_size": 8, "patch_size": 4},
        projection_dim=4,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8).save_pretrained(folder)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    names = ("config.json", "preprocessor_config.json", "vocab.json")
    values = {name: json.loads((folder / name).read_text()) for name in names}
    weights = (folder / "model.safetensors").read_bytes()

    def change(rng: Random) -> None:
        name = rng.choice((*names, "model.safetensors", "tokenizer_config.json"))
        if name == "model.safetensors":
            return _put(folder / name, _odd_safetensors(weights, rng))
        value = values.get(name, {"tokenizer_class": "CLIPTokenizer", "model_max_length": 8})
        return _put(folder / name, odd_json(value, rng))

    return Subject(folder, partial(load_hf, str(folder), str(folder)), [change])


def diffusion(folder: Path) -> Subject:
    """Damage LoRA of text encoders from kohya's scripts and diffusers."""
    folder.mkdir()
    path, state = folder / "a.safetensors", dict[str, Tensor]()
    for role in ("q", "v"):
        stem = f"lora_te_text_model_encoder_layers_0_self_attn_{role}_proj"
        other = f"text_encoder_2.text_model.encoder.layers.3.self_attn.{role}_proj"
        down, up = torch.ones(RANK, WIDTH), torch.ones(WIDTH, RANK)
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        state |= {f"{stem}.alpha": torch.ones(()), f"{other}.lora_A.weight": down.clone()}
        state[f"{other}.lora_B.weight"] = up.clone()
    told = {"lora_adapter_metadata": json.dumps({"text_encoder_2.lora_alpha": 4})}
    save_file(state, path, told)
    whole = path.read_bytes()

    def read() -> None:
        try:
            detect(path)
        finally:
            read_any(path, text_layers=1)

    return Subject(folder, read, [lambda rng: _put(path, _odd_safetensors(whole, rng))], (path.name,))


def _small_config(folder: Path) -> Path:
    path = folder / "m.json"
    path.write_text(json.dumps({**TINY, "text_cfg": {**TINY["text_cfg"], "vocab_size": 50}}))  # type: ignore[dict-item]
    return path


def _small_model() -> torch.nn.Module:
    import open_clip

    config = {**TINY, "text_cfg": {**TINY["text_cfg"], "vocab_size": 50}}  # type: ignore[dict-item]
    model: torch.nn.Module = open_clip.CLIP(**config)
    return model


READERS: dict[str, Callable[[Path], Subject]] = {
    "weights.latest": latest,
    "weights.guide": guide,
    "weights.clip-lora": clip_lora,
    "weights.adapter": adapter,
    "weights.head": heads,
    "weights.config": configs,
    "weights.checkpoint": checkpoints,
    "weights.torchscript": archives,
    "weights.hf-folder": hf_folders,
    "weights.diffusion": diffusion,
}
