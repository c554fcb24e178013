"""Make what all contestants start from: photographs, one random ViT-B-32 in both layouts, one new adapter.

Runs in a child of its own, so that the process that measures stays small.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.data import make_data
from benchmarks.settings import WORK

if TYPE_CHECKING:
    from clipgraft.models.clip import Clip

OPENCLIP_BASE = WORK / "base" / "ViT-B-32.safetensors"
HF_BASE = WORK / "base" / "hf"
LORA: dict[str, Any] = {"r": 16, "alpha": 16.0}
DROPOUT = 0.1
_START, _END = "<|startoftext|>", "<|endoftext|>"


def prepare(photos: str, images: int, seed: int) -> dict[str, Any]:
    """Make whatever is missing."""
    make_data(Path(photos), images, seed)
    if not (HF_BASE / "config.json").exists():
        make_base(seed)
    for targets in ("text-attention", "attention"):
        for dropout in (0.0, DROPOUT):
            if not adapter_folder(targets, dropout).exists():
                make_adapter(targets, dropout)
    return {}


def adapter_folder(targets: str, dropout: float) -> Path:
    """Return the folder of a newly initialised adapter in PEFT's layout, where all contestants start."""
    return WORK / "adapters" / f"{targets}-{dropout}"


def make_base(seed: int) -> None:
    """Save the same random weights as an open_clip checkpoint and as a transformers folder."""
    from safetensors.torch import save_file

    import clipgraft as cg

    OPENCLIP_BASE.parent.mkdir(parents=True, exist_ok=True)
    clip = cg.load("ViT-B-32", pretrained="none", seed=seed)
    save_file({name: w.contiguous() for name, w in clip.model.state_dict().items()}, OPENCLIP_BASE)
    save_hf(clip, HF_BASE)


def save_hf(clip: Clip, folder: Path) -> None:
    """Save an open_clip ViT-B-32 as a transformers folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    config = CLIPConfig(
        text_config={
            "hidden_act": "gelu",
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 49407,
        },
        vision_config={"hidden_act": "gelu"},
    )
    model = CLIPModel(config)
    model.load_state_dict({name: w.clone() for name, w in clip.family.canonical_weights(clip.model)})
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    model.save_pretrained(folder)


def clip_tokenizer() -> Any:
    """Build transformers' CLIP tokenizer from the vocabulary that open_clip ships."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    shipped = SimpleTokenizer()
    names = {"<start_of_text>": _START, "<end_of_text>": _END}
    vocabulary = {names.get(piece, piece): number for piece, number in shipped.encoder.items()}
    merges = sorted(shipped.bpe_ranks, key=shipped.bpe_ranks.__getitem__)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def make_adapter(targets: str, dropout: float) -> None:
    import torch

    import clipgraft as cg

    clip = cg.load("ViT-B-32", pretrained=OPENCLIP_BASE)
    torch.manual_seed(0)
    cg.apply_lora(clip, **LORA, dropout=dropout, targets=targets)
    cg.save_adapter(clip, adapter_folder(targets, dropout))
