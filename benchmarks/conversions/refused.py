"""Try what stock PEFT does with adapters that it cannot represent completely."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import clipgraft as cg
from benchmarks.conversions.file_rows import write_as
from benchmarks.conversions.peft_rows import inner, open_in_peft, train_with_peft
from benchmarks.conversions.world import World, adapted, differences
from clipgraft.models.library_calls import quiet_libraries

_LONGEST = 150
# Sets of names, which come in another order each time, and temporary files.
_PLACES = re.compile(r"(?<=\{)'[^}]*'(?=\})|(?<=')/[^']*(?=')")


def attempts() -> dict[str, Callable[[World], str]]:
    """Make each attempt and describe the outcome."""
    return {
        "a trained temperature (`train_logit_scale`)": _temperature,
        'PEFT\'s own `modules_to_save=["logit_scale"]`': _temperature_by_peft,
        "an adapter folder on an open_clip model": _on_open_clip,
        "an update of open_clip's position table, made there by PEFT": _position_table,
        "DoRA on open_clip's fused attention, made there by PEFT": _dora_on_open_clip,
        "an adapter folder on `CLIPTextModel` or `CLIPVisionModel`": _on_one_tower,
        "a second adapter with biases on one model": _two_with_biases,
        "biases under `with model.disable_adapter()`": _disabled_biases,
        "DoRA by transformers' own `CLIPModel.load_adapter`": _dora_by_transformers,
        "rows of two adapters through `get_image_features(adapter_names=…)`": _mixed_rows,
        "a `.pt` of the guide": lambda world: _file(world, "guide"),
        "a `.pt` of CLIP-LoRA": lambda world: _file(world, "clip-lora"),
        "an adapter on a model that has no `CLIPModel` twin": _no_twin,
    }


def _told(attempt: Callable[[], object]) -> str:
    """Return the exception of an attempt in one line."""
    try:
        attempt()
    except Exception as error:
        line = _PLACES.sub("…", " ".join(str(error).split()))
        short = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
        return f"refused, {type(error).__name__}: {short}"
    return "loads"


def _folder(world: World, family: str = "transformers", **options: Any) -> Path:
    return cg.save_adapter(
        adapted(world, family, **{"r": 4, "targets": "attention", **options}), world.place()
    )


def _peft(base: nn.Module, **options: Any) -> Any:
    return peft.get_peft_model(base, peft.LoraConfig(r=4, **options))


def _temperature(world: World) -> str:
    clip = adapted(world, "transformers", r=4, targets="attention", train_logit_scale=True)
    opened: Any = open_in_peft(world.fresh("transformers").model, cg.save_adapter(clip, world.place()))
    same = differences(world.run(opened), world.run(clip.model))[1]
    base, there, here = (m.logit_scale.item() for m in (world.bases["transformers"], opened, clip))
    return (
        f"loads, features agree to {same:.0e}, but logit_scale stays {there:.4f} as in the base "
        f"({base:.4f}); the adapter's is {here:.4f}: it is in clipgraft.json alone"
    )


def _temperature_by_peft(world: World) -> str:
    from safetensors.torch import load_file

    base, folder = world.fresh("transformers").model, world.place()
    _peft(base, target_modules=["q_proj"], modules_to_save=["logit_scale"]).save_pretrained(str(folder))
    names = [n for n in load_file(folder / "adapter_model.safetensors") if "logit_scale" in n]
    return f"accepted, and {names or 'nothing of it'} is saved: it is a parameter, not a module"


def _on_open_clip(world: World) -> str:
    folder = _folder(world, "open_clip")
    return _told(lambda: peft.PeftModel.from_pretrained(world.fresh("open_clip").model, str(folder)))


def _position_table(world: World) -> str:
    base = world.fresh("open_clip").model
    return _told(lambda: _peft(base, target_modules=["positional_embedding"]))


def _dora_on_open_clip(world: World) -> str:
    base = world.fresh("open_clip").model
    return _told(lambda: _peft(base, target_modules=["attn"], use_dora=True))


def _on_one_tower(world: World) -> str:
    from transformers import CLIPTextModel, CLIPVisionModel

    folder = _folder(world)
    config: Any = world.bases["transformers"].model.config
    text, vision = CLIPTextModel(config.text_config), CLIPVisionModel(config.vision_config)
    towers: tuple[Any, ...] = (text, vision)
    told = [_told(partial(peft.PeftModel.from_pretrained, tower, str(folder))) for tower in towers]
    return "; ".join(dict.fromkeys(told))


def _two_with_biases(world: World) -> str:
    folder = _folder(world, bias="lora_only")
    opened = peft.PeftModel.from_pretrained(world.fresh("transformers").model, str(folder))
    return _told(lambda: opened.load_adapter(str(folder), "second"))


def _disabled_biases(world: World) -> str:
    folder = _folder(world, bias="lora_only")
    opened = peft.PeftModel.from_pretrained(world.fresh("transformers").model, str(folder)).eval()
    with opened.disable_adapter():
        left = differences(world.run(inner(opened)), world.untouched)[1]
    return f"the base is not what runs: PEFT leaves the adapter's biases in it, features are {left:.0e} away"


def _dora_by_transformers(world: World) -> str:
    """Save PEFT's own adapter, so that none of our names is involved."""
    folder, model = world.place(), world.fresh("transformers").model
    trained = train_with_peft(model, folder, target_modules=["q_proj", "v_proj"], use_dora=True)
    opened: Any = world.fresh("transformers").model
    with quiet_libraries():
        opened.load_adapter(str(folder))
    gap = differences(world.run(opened.eval()), world.run(trained))[1]
    return (
        "loads, without the magnitudes (it reports them as missing): features of an adapter that PEFT itself "
        f"made are {gap:.0e} away from PEFT's"
    )


def _mixed_rows(world: World) -> str:
    folder = _folder(world)
    opened: Any = peft.PeftModel.from_pretrained(world.fresh("transformers").model, str(folder)).eval()
    names = ["__base__"] * len(world.pixels)
    with torch.no_grad():
        got = opened.get_image_features(pixel_values=world.pixels, adapter_names=names).pooler_output
    adapter = world.run(opened.get_base_model())[0]
    base = world.run(world.bases["transformers"].model)[0]
    wrong, right = differences([got], [adapter])[1], differences([got], [base])[1]
    return (
        f"runs, and the names are ignored: rows that ask for the base are {right:.0e} away from it and "
        f"{wrong:.0e} from the active adapter"
    )


def _file(world: World, form: Any) -> str:
    clip = adapted(world, "open_clip", r=4)
    path = write_as(world, clip, form, world.place() / "lora.pt")
    return _told(lambda: peft.PeftModel.from_pretrained(world.fresh("transformers").model, str(path)))


def _no_twin(world: World) -> str:
    """Adapt a tower without a causal mask, which open_clip has and transformers' CLIPModel has not."""
    import open_clip

    from clipgraft.models.clip import as_clip
    from clipgraft.models.convert import to_transformers

    config: dict[str, Any] = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1},
        "text_cfg": {"width": 32, "heads": 2, "layers": 1, "no_causal_mask": True},
    }
    clip = as_clip(open_clip.CustomTextCLIP(**config).eval())
    cg.apply_lora(clip, r=4, targets="attention")
    cg.save_adapter(clip, world.place())
    cg.remove_lora(clip)
    return f"saved, but there is no model to load it on ({_told(lambda: to_transformers(clip))})"
