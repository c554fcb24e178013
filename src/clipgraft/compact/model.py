"""Make a CLIP with fewer blocks and tokens, which inherits its weights, and write it as a folder."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.compact.args import CompactArgs
from clipgraft.compact.vocabulary import (
    bpe_of,
    count_tokens,
    count_unchanged,
    cut_tokenizer,
    kept_merges,
    most_used,
    needed_tokens,
    write_vocabulary,
)
from clipgraft.errors import ConfigError, DataError, ModelError
from clipgraft.files import atomic_folder, write_json
from clipgraft.models.clip import Clip, ClipLike, Source, as_clip
from clipgraft.models.convert import require_bare, to_transformers, why_not_plain
from clipgraft.models.hf import LARGEST_ID_AS_EOS
from clipgraft.models.library_calls import no_initialization, quiet_libraries
from clipgraft.models.processors import HfTokenizer, find_preprocess, find_tokenizer
from clipgraft.models.saved import save_transformers_files, weights_size
from clipgraft.models.sites import TOWERS, Site, Tower
from clipgraft.results import Result

_LAYER = re.compile(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)")
RECORD = "compact.json"
_EMBEDDING = "text_model.embeddings.token_embedding.weight"


@dataclass(frozen=True)
class Vocabulary:
    """What became of the tokens.

    Attributes:
        token_ids: the base's id of every token that stayed; its place is its new id.
        before: how many the base has.
        texts: how many texts of a corpus were looked at.
        unchanged: how many of these are still split into the same tokens.
    """

    token_ids: tuple[int, ...]
    before: int
    texts: int
    unchanged: int

    def __repr__(self) -> str:
        return f"{len(self.token_ids):,} of {self.before:,} tokens"


@dataclass(frozen=True, repr=False)
class Compacted(Result):
    """A smaller model and what was taken of the base.

    Attributes:
        clip: a `transformers.CLIPModel` of its own weights, with tokenizer and preprocessing.
        base: what it was made from.
        fingerprint: of the base; "" for one without weights.
        text_blocks, vision_blocks: the blocks that stayed.
        vocabulary: None if all tokens did.
        parameters, base_parameters: how many weights there are, and were.
    """

    _shows = ("base", "parameters", "base_parameters", "text_blocks", "vision_blocks", "vocabulary")
    _hidden = frozenset({"clip"})

    clip: Clip
    base: Source
    fingerprint: str
    text_blocks: tuple[int, ...]
    vision_blocks: tuple[int, ...]
    vocabulary: Vocabulary | None
    parameters: int
    base_parameters: int


@dataclass(frozen=True)
class _Cut:
    """A tokenizer with fewer tokens; new ids are places in `token_ids`."""

    inner: Any
    vocabulary: Vocabulary


def compact_model(
    model: ClipLike, args: CompactArgs | None = None, *, texts: Sequence[str] | None = None, **options: Any
) -> Compacted:
    """Make a new, smaller CLIP that inherits its weights; the base is left as it is.

    With all blocks kept, every text of `texts` has the features it had, to the last bit, and any other text
    can still be encoded: words that lost their tokens fall back on smaller pieces. An open_clip base becomes
    one of transformers first (`models.convert.to_transformers`).

    Args:
        model: a plain CLIP without adapters, with its tokenizer if tokens are to be cut.
        args: which blocks and how many tokens to keep.
        texts: the corpus whose tokens are kept.
        **options: single fields of `CompactArgs`, such as `text_layers=3`, in place of those of `args`.

    Raises:
        ConfigError: nothing to cut, blocks that are not there, or a vocabulary that is too small.
        DataError: `texts` is empty.
        ModelError: the model carries an adapter, or is not one that transformers can hold.
    """
    clip = as_clip(model)
    args = (args or CompactArgs()).replace(**options)
    require_bare(clip)
    if args == CompactArgs() and texts is None:
        raise ConfigError("nothing to cut: give `text_layers`, `vision_layers`, `texts` or `vocab_size`")
    if why := why_not_plain(clip):
        raise ModelError(
            f"{clip.source.name or type(clip.model).__name__} cannot be cut: {why}. Cut a model whose towers "
            "are both CLIP's own (transformers.CLIPModel, open_clip's ViT-B-32), or take a smaller model of "
            "its family"
        )
    base = to_transformers(clip)
    kept: dict[Tower, tuple[int, ...]] = {
        "text": choose_blocks("text", _depth(base, "text"), args.text_layers, args.text_blocks),
        "vision": choose_blocks("vision", _depth(base, "vision"), args.vision_layers, args.vision_blocks),
    }
    tokenizer = base.tokenizer or find_tokenizer(base.family, base.model)
    cut = None
    if texts is not None or args.vocab_size is not None:
        cut = _cut(base, getattr(tokenizer, "inner", None), texts, args.vocab_size, args.vocab_lossy)
    small = _build(base, kept, cut)
    return Compacted(
        clip=replace(
            base,
            model=small,
            tokenizer=tokenizer if cut is None else HfTokenizer(cut.inner, base.context_length),
            preprocess=base.preprocess or find_preprocess(base.family, base.model),
            source=Source(),
        ),
        base=clip.source,
        fingerprint="" if clip.device.type == "meta" else clip.fingerprint,
        text_blocks=kept["text"],
        vision_blocks=kept["vision"],
        vocabulary=None if cut is None else cut.vocabulary,
        parameters=_count(small),
        base_parameters=_count(base.model),
    )


def choose_blocks(
    tower: Tower, depth: int, layers: int | None = None, blocks: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The blocks of a tower of `depth` that stay: `layers` spread evenly, or `blocks` as given; else all.

    Spread evenly, the first and the last are among them: 3 of 12 are 0, 5 and 11.

    Raises:
        ConfigError: both are given, or what is given is not in the tower or not in order.
    """
    if layers is not None and blocks is not None:
        raise ConfigError(f"`{tower}_layers` and `{tower}_blocks` both choose blocks: give one of them")
    if blocks is not None:
        return _checked(tower, depth, tuple(blocks))
    if layers is None:
        return tuple(range(depth))
    if not 1 <= layers <= depth:
        raise ConfigError(f"`{tower}_layers={layers}`: the {tower} tower has {depth}; keep 1 to {depth}")
    return tuple(place * (depth - 1) // max(layers - 1, 1) for place in range(layers))


def _checked(tower: Tower, depth: int, blocks: tuple[int, ...]) -> tuple[int, ...]:
    shown = ",".join(map(str, blocks))
    outside = [block for block in blocks if not 0 <= block < depth]
    if outside or not blocks:
        what = f"there is no block {outside[0]}" if outside else "no block is left"
        raise ConfigError(f"`{tower}_blocks={shown}`: {what}; name some of 0 to {depth - 1}")
    if list(blocks) != sorted(set(blocks)):
        raise ConfigError(f"`{tower}_blocks={shown}`: name each block once, in rising order")
    return blocks


def _depth(base: Clip, tower: Tower) -> int:
    return 1 + max(site.block for site in base.sites if site.tower == tower and site.block is not None)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _cut(base: Clip, inner: Any, texts: Sequence[str] | None, size: int | None, lossy: bool) -> _Cut:
    if inner is None:
        raise ModelError("this model has no tokenizer to cut: load it with clipgraft.load(...)")
    if texts is not None and not texts:
        raise DataError("there is no text to take a vocabulary from; give at least one")
    bpe, rows = bpe_of(inner), base.site_refs[Site("text", None, "token_embedding")].shape[0]
    if max(bpe.ids.values()) >= rows:
        raise ModelError(
            f"the tokenizer has ids up to {max(bpe.ids.values())} but the model {rows} token embeddings"
        )
    counts = count_tokens(inner, texts or ())
    needed = needed_tokens(bpe, counts)
    kept = needed if size is None else most_used(bpe, counts, size)
    unchanged = len(texts or ())
    if not needed <= kept:
        if not lossy:
            raise ConfigError(
                f"`vocab_size={size}`: the corpus needs {len(needed)} tokens to be encoded as before; "
                "ask for as many or more, or add `vocab_lossy=True` to keep the most used"
            )
        unchanged = count_unchanged(inner, texts or (), bpe, kept)
    tokens = sorted(kept, key=bpe.ids.__getitem__)
    made = cut_tokenizer(inner, tokens, kept_merges(bpe, kept))
    ids = tuple(bpe.ids[token] for token in tokens)
    return _Cut(made, Vocabulary(ids, rows, len(texts or ()), unchanged))


def _build(base: Clip, kept: Mapping[Tower, Collection[int]], cut: _Cut | None) -> nn.Module:
    """A new model with the base's type, device and weights, in eval mode."""
    from transformers import CLIPModel

    config = copy.deepcopy(base.model.config)
    # Under its old name transformers would find the base's tokenizer for it.
    config.name_or_path = ""  # type: ignore[union-attr]
    for tower in TOWERS:
        getattr(config, f"{tower}_config").num_hidden_layers = len(kept[tower])
    if cut is not None:
        _set_ids(config.text_config, cut)  # type: ignore[union-attr]
    with torch.device(base.device), no_initialization(), quiet_libraries():
        model: nn.Module = CLIPModel(config)
    model.to(dtype=base.dtype)
    model.load_state_dict(dict(_weights(base.model.state_dict(), kept, cut)))
    return model.eval()


def _set_ids(config: Any, cut: _Cut) -> None:
    """The text configuration's ids, which must pool the same positions as before."""
    inner, old = cut.inner, cut.vocabulary.token_ids
    pooled = config.eos_token_id
    config.vocab_size = len(old)
    config.bos_token_id, config.pad_token_id = inner.bos_token_id, inner.pad_token_id
    if pooled == LARGEST_ID_AS_EOS:
        # Ids keep their order, so the largest is still the one. Where that is always the end of the text, the
        # configuration can say so; if not, it goes on asking for the largest.
        last = len(old) - 1
        config.eos_token_id = last if inner.eos_token_id == last else LARGEST_ID_AS_EOS
        return
    if pooled not in old:
        raise ModelError(f"the model pools at token {pooled}, which its tokenizer does not know")
    if old.index(pooled) == LARGEST_ID_AS_EOS:
        raise ModelError(
            f"the end-of-text token would become {LARGEST_ID_AS_EOS}, which transformers takes for another "
            "rule: keep more tokens"
        )
    config.eos_token_id = old.index(pooled)


def _weights(
    state: Mapping[str, Tensor], kept: Mapping[Tower, Collection[int]], cut: _Cut | None
) -> Iterator[tuple[str, Tensor]]:
    places = {tower: {block: place for place, block in enumerate(kept[tower])} for tower in TOWERS}
    for name, weight in state.items():
        if found := _LAYER.fullmatch(name):
            tower, block, rest = found.groups()
            place = places[tower].get(int(block))  # type: ignore[index]
            if place is not None:
                yield f"{tower}_model.encoder.layers.{place}.{rest}", weight
        elif name == _EMBEDDING and cut is not None:
            yield name, weight[torch.tensor(cut.vocabulary.token_ids, device=weight.device)]
        else:
            yield name, weight


def check_out(out: Path) -> None:
    """Make sure that writing to `out` destroys nothing; raises ModelError where something is there."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ModelError(
            f"{out} exists already and is left as it is: choose another path, or remove it first"
        )


def write_compact(compacted: Compacted, out: str | Path) -> Path:
    """Write a folder for `CLIPModel`, `AutoTokenizer`, `AutoImageProcessor` and `clipgraft.load`.

    `compact.json` says which blocks and tokens of which base it is made of. All of it is there, or nothing.

    Raises:
        ModelError: `out` exists, or the model came without tokenizer or preprocessing.
    """
    out = Path(out)
    check_out(out)
    clip = compacted.clip
    clip.tokenize("")
    clip.require_preprocess()
    with atomic_folder(out, weights_size(clip)) as folder:
        save_transformers_files(clip, folder)
        if compacted.vocabulary is not None and isinstance(clip.tokenizer, HfTokenizer):
            write_vocabulary(clip.tokenizer.inner, folder)
        write_json(folder / RECORD, _record(compacted))
    return out


def _record(compacted: Compacted) -> dict[str, object]:
    cut = compacted.vocabulary
    return {
        "base": {**asdict(compacted.base), "fingerprint": compacted.fingerprint},
        "text_blocks": compacted.text_blocks,
        "vision_blocks": compacted.vision_blocks,
        "token_ids": None if cut is None else cut.token_ids,
    }
