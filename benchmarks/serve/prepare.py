"""Make the base, its adapters and merged copies that servers are measured with."""

from __future__ import annotations

from typing import Any

from benchmarks.prepare import HF_BASE, LORA, make_base
from benchmarks.settings import WORK

_FOLDER = WORK / "serve"


def prepare(adapters: int, copies: int = 4) -> dict[str, Any]:
    """Make whatever is missing: `a0000`, … as adapter folders, and the first ones merged."""
    if not (HF_BASE / "config.json").exists():
        make_base(0)
    _make_adapters(adapters)
    _make_copies(copies)
    return {}


def _make_adapters(count: int) -> None:
    import torch

    import clipgraft as cg

    missing = [n for n in range(count) if not (_FOLDER / "adapters" / f"a{n:04}").exists()]
    if not missing:
        return
    clip = cg.load(f"hf:{HF_BASE}")
    cg.apply_lora(clip, **LORA, targets="text-attention")
    (_FOLDER / "adapters").mkdir(parents=True, exist_ok=True)
    for number in missing:
        torch.manual_seed(number)
        with torch.no_grad():
            for name, weight in clip.model.named_parameters():
                if name.endswith("lora_B"):
                    weight.normal_(std=0.02)
        cg.save_adapter(clip, _FOLDER / "adapters" / f"a{number:04}")


def _make_copies(count: int) -> None:
    from transformers import CLIPImageProcessor

    import clipgraft as cg
    from benchmarks.prepare import clip_tokenizer

    for number in range(count):
        place = _FOLDER / "merged" / f"a{number:04}"
        if (place / "config.json").exists():
            continue
        clip = cg.load(f"hf:{HF_BASE}")
        cg.load_adapter(clip, _FOLDER / "adapters" / f"a{number:04}")
        cg.merge_lora(clip)
        cg.lora.remove_lora(clip, keep_merged=True)
        model: Any = clip.model
        model.save_pretrained(place)
        clip_tokenizer().save_pretrained(place)
        CLIPImageProcessor().save_pretrained(place)
