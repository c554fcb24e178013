"""`clipgraft merge` and `clipgraft convert`: write adapters in another form."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft.cli import checks
from clipgraft.cli.flags.groups import flag
from clipgraft.cli.flags.shared import PromptFlags
from clipgraft.cli.flags.tools import ConvertFlags, MergeFlags
from clipgraft.cli.parser import parse
from clipgraft.cli.sum_comparison import compare_sum, eval_faults
from clipgraft.errors import AdapterError, ConfigError, together
from clipgraft.options import Options

if TYPE_CHECKING:
    from clipgraft.adapters.adapter_file import AdapterFile
    from clipgraft.adapters.run_folder import RunModel
    from clipgraft.lora.combine import Combination
    from clipgraft.models.clip import Clip
    from clipgraft.models.forms.form import Gate

log = logging.getLogger("clipgraft")
_MERGE = "Merge adapters into their base and write a standalone model, or write their sum as one adapter."
_CONVERT = "Convert an adapter to another format. It computes the same afterwards."


def run_merge(argv: Sequence[str]) -> None:
    """Parse, load, merge, write, and print what was written."""
    kinds: list[type[Options]] = [MergeFlags, PromptFlags]
    spec, prompts = parse("merge", _MERGE, kinds, argv)
    weights = _weights(spec, prompts)
    from clipgraft.adapters.attach import put_on
    from clipgraft.adapters.convert import check_free, read_any
    from clipgraft.adapters.run_folder import find_run_model
    from clipgraft.cli.common import name_after

    if spec.to == "adapter":
        check_free(spec.out, "peft", spec.overwrite)
    if len(spec.adapters) == 1 and (whole := find_run_model(spec.adapters[0])) and whole.kind != "adapter":
        _export(whole, spec)
        return
    files = [read_any(path, peft_out_proj=spec.peft_out_proj) for path in spec.adapters]
    if spec.model is not None:
        files = [_with_base(file, spec.model, spec.pretrained) for file in files]
    clip = _base_of(files[0], spec.force, given=spec.model is not None)
    log.info("base %s, fingerprint %s", clip.source.name, clip.fingerprint)
    amounts: dict[str, float] = {}
    for file, weight in zip(files, weights, strict=True):
        name = name_after(file.path, amounts)
        put_on(clip, file, name, force=spec.force)
        amounts[name] = weight
        log.info("%s: %s, %d sites, weight %g", name, file.path, len(file.parts), weight)
    if spec.to == "adapter":
        _write_sum(clip, amounts, spec, prompts)
    else:
        _write_model(clip, amounts, spec)


def _export(whole: RunModel, spec: MergeFlags) -> None:
    """Write the whole model that a run made, in which there is nothing to merge."""
    from clipgraft.adapters.open import load
    from clipgraft.models.export import write_model

    given = [name for name in ("weights", "model", "pretrained") if getattr(spec, name) is not None]
    given += ["average"] if spec.average else []
    if spec.to == "adapter" or given:
        flags = ", ".join(
            [*(flag(name) for name in given), *(["--to adapter"] if spec.to == "adapter" else [])]
        )
        raise ConfigError(f"{flags}: {whole.run} made no adapter, but a {whole.kind} model: drop the flag")
    clip = load(spec.adapters[0])
    log.info("%s: there is nothing to merge in a %s model", whole.run, whole.kind)
    form: Any = _form(spec, clip)
    gate = _gate(spec, clip)
    write_model(clip, spec.out, form, progress=False, overwrite=spec.overwrite, gate=gate)
    _report(spec.out, form)


def _weights(spec: MergeFlags, prompts: PromptFlags) -> tuple[float, ...]:
    """Return the weight of each adapter; raises ConfigError for flags that do not go together."""
    faults = []
    given = 1 if spec.weights is None else len(spec.weights)
    if spec.weights is not None and given != len(spec.adapters):
        faults.append(f"--weights: {given} numbers for {len(spec.adapters)} adapters: give one each")
    if spec.average and spec.weights is not None:
        faults.append("--average weighs all adapters alike, and --weights does not: give one of them")
    if spec.average and len(spec.adapters) == 1:
        faults.append("--average given with one adapter: name several, joined by commas")
    faults += eval_faults(spec, prompts)
    if spec.rank is not None and spec.to != "adapter":
        faults.append("--rank belongs to --to adapter: a merged model has no rank")
    if spec.out.suffix == ".onnx":
        faults.append(f"{spec.out}: ONNX is two files, one a tower: name a folder, with --to onnx")
    faults += _gate_faults(spec)
    if spec.to == "comfyui" and spec.out.suffix != ".safetensors":
        faults.append(f"{spec.out}: --to comfyui writes one file: name it with .safetensors")
    faults += checks.output_faults("OUT", spec.out, folder=spec.out.suffix not in (".pt", ".safetensors"))
    if spec.pretrained is not None and spec.model is None:
        faults.append(f"--pretrained {spec.pretrained} belongs to a --model: name it too")
    if faults:
        raise together(faults)
    count = len(spec.adapters)
    return spec.weights or (1 / count if spec.average else 1.0,) * count


def _gate_faults(spec: MergeFlags) -> list[str]:
    if spec.to != "onnx-int8":
        given = [name for name in ("gate", "max_recall_loss") if getattr(spec, name) is not None]
        return [f"{flag(name)} belongs to --to onnx-int8: nothing else loses recall" for name in given]
    if spec.gate is None:
        return [
            "--to onnx-int8 loses some recall, and there is nothing to measure it on: add --gate, a table of "
            "images and captions of your own"
        ]
    return checks.missing_data("--gate", spec.gate)


def _form(spec: MergeFlags, clip: Clip) -> str:
    """Choose what to write: as asked for, else by the file name, else for the base's own library."""
    if spec.to != "auto":
        return spec.to
    return "open_clip" if spec.out.suffix in (".pt", ".safetensors") else clip.family.name


def _write_sum(clip: Clip, amounts: Mapping[str, float], spec: MergeFlags, prompts: PromptFlags) -> None:
    from clipgraft.adapters.folder import save_adapter
    from clipgraft.lora.combine import combine_adapters

    what, name = ("average" if spec.average else "sum"), "+".join([*amounts, "sum"])
    made = combine_adapters(clip, amounts, name, rank=spec.rank)
    titles = {name: f"{what}, rank {_ranks(made)}"}
    log.info("the %s has rank %s", what, _ranks(made))
    if spec.rank is not None:
        told = "cut to rank %d: %.2f %% of the %s is lost (Frobenius norm), %.2f %% of its energy is kept"
        log.info(told, spec.rank, 100 * made.error, what, 100 * (1 - made.error**2))
    if spec.eval is not None:
        if spec.rank is not None:
            whole = combine_adapters(clip, amounts, f"{name}+whole", activate=False)
            titles = {whole.name: f"{what}, rank {_ranks(whole)}", **titles}
        compare_sum(clip, [*amounts], titles, spec, prompts)
    _report(save_adapter(clip, spec.out, overwrite=spec.overwrite), "adapter")


def _ranks(made: Combination) -> str:
    ranks = sorted(set(made.ranks.values()))
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _write_model(clip: Clip, amounts: Mapping[str, float], spec: MergeFlags) -> None:
    from clipgraft.lora.control import merge_lora
    from clipgraft.lora.inject import remove_lora
    from clipgraft.models.export import write_model

    merge_lora(clip, amounts)
    remove_lora(clip, keep_merged=True)
    form: Any = _form(spec, clip)
    gate = _gate(spec, clip)
    write_model(clip, spec.out, form, progress=False, overwrite=spec.overwrite, gate=gate)
    _report(spec.out, form)


def _gate(spec: MergeFlags, clip: Clip) -> Gate | None:
    """What judges int8: the recall that the merged model loses on the user's pairs."""
    if spec.gate is None:
        return None
    from clipgraft.data.reader import read_pairs
    from clipgraft.evaluate.graph_gate import GraphGate

    limit = 1.0 if spec.max_recall_loss is None else spec.max_recall_loss
    return GraphGate(clip, read_pairs(spec.gate), limit, str(spec.gate))


def run_convert(argv: Sequence[str]) -> None:
    """Parse, read, write, and print what was read and written."""
    (spec,) = parse("convert", _CONVERT, [ConvertFlags], argv)
    if spec.pretrained is not None and spec.model is None:
        raise ConfigError(f"--pretrained {spec.pretrained} belongs to a --model: name it too")
    from clipgraft.adapters.attach import in_terms_of
    from clipgraft.adapters.convert import check_free, detect, read_any, write_any
    from clipgraft.models.export import size_on_disk

    check_free(spec.out, spec.to, spec.overwrite)
    adapter = read_any(
        spec.src,
        peft_out_proj=spec.peft_out_proj,
        text_layers=spec.text_layers,
        vision_layers=spec.vision_layers,
    )
    log.info("read %s", _describe(adapter, detect(spec.src)))
    if spec.model is not None:
        adapter = _with_base(adapter, spec.model, spec.pretrained)
    base_state = None
    if adapter.needs_base or spec.to == "guide-full":
        clip = _base_of(adapter, given=spec.model is not None)
        adapter, base_state = in_terms_of(clip, adapter), clip.model.state_dict()
    written = write_any(
        adapter,
        spec.out,
        spec.to,
        base_state_dict=base_state,
        text_layers=spec.text_layers,
        vision_layers=spec.vision_layers,
        overwrite=spec.overwrite,
    )
    size = size_on_disk(written)
    log.info("wrote %s: %s, %s bytes (%.1f MB)", spec.to, written, f"{size:,}", size / 1e6)
    if adapter.logit_scale is not None and spec.to in ("guide", "clip-lora"):
        log.info(
            "the trained temperature is in the file for clipgraft only; the %s format has no place for it",
            spec.to,
        )


def _describe(adapter: AdapterFile, kind: str) -> str:
    """Describe an adapter in one line: format, number of sites, ranks, scales and base."""
    ranks = sorted(set(adapter.ranks.values()))
    scales = sorted(set(adapter.scales.values()))
    base = " / ".join(part for key in ("name", "pretrained") if (part := adapter.base.get(key)))
    return (
        f"{kind}: {adapter.path}, {len(adapter.parts)} sites, rank {_span(ranks)}, scale {_span(scales)}, "
        f"base {base or 'not named'}"
    )


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _with_base(adapter: AdapterFile, model: str, pretrained: str | None) -> AdapterFile:
    """Replace the base of an adapter by `--model` and `--pretrained`."""
    return replace(adapter, base={**adapter.base, "name": model, "pretrained": pretrained or ""})


def _base_of(adapter: AdapterFile, force: bool = False, *, given: bool = False) -> Clip:
    """Load the base that an adapter names, or that the user has `given`, in fp32 on the CPU.

    Raises:
        AdapterError: it names none, or what it names is another base and that is not `force`d.
    """
    from clipgraft.adapters.open import load, tell_base
    from clipgraft.lora.state import lora_state

    name = adapter.base.get("name")
    if not name:
        raise AdapterError(
            f"{adapter.path} does not name its base, whose weights are needed: pass --model and --pretrained"
        )
    if not given:
        tell_base(name, adapter.base.get("pretrained"), f"the adapter {adapter.path}")
    clip = load(name, adapter.base.get("pretrained") or None)
    if lora_state(clip) is not None:
        raise AdapterError(f"--model {name} is an adapter on its base: give the base")
    if not force and adapter.fingerprint not in (None, clip.fingerprint):
        raise AdapterError(
            f"{adapter.path} was made for a base with fingerprint {adapter.fingerprint}, but {name} has "
            f"{clip.fingerprint}: pass --model and --pretrained of its own base"
        )
    return clip


def _report(path: Path, form: str) -> None:
    from clipgraft.models.export import size_on_disk

    log.info("wrote %s: %s (%.1f MB)", form, path, size_on_disk(path) / 1e6)
