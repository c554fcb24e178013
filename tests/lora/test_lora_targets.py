"""Target sets and expressions against a matcher that tries every site on its own."""

from __future__ import annotations

import re
from collections.abc import Sequence

import open_clip
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPConfig, CLIPModel

import clipgraft as cg
from clipgraft.lora.state import require_lora
from clipgraft.lora.targets import TARGET_SETS, guide_targets, override_values, select_sites
from clipgraft.models.clip import as_clip
from clipgraft.models.sites import Site

BLOCK = ("q", "k", "v", "out", "fc1", "fc2")
DEPTH = {"text": 12, "vision": 5}
OUTSIDE = {
    "text": ("token_embedding", "position_embedding", "proj"),
    "vision": ("patch_embedding", "position_embedding", "pool_q", "pool_fc1", "proj", "proj_fc1"),
}
NAMES = [
    *(f"{tower}.{block}.{role}" for tower in DEPTH for block in range(DEPTH[tower]) for role in BLOCK),
    *(f"{tower}.{role}" for tower in OUTSIDE for role in OUTSIDE[tower]),
    *(f"vision.4.{role}" for role in ("gate", "conv_dw", "downsample")),
]
SITES = [Site.parse(name) for name in NAMES]


def names(sites: Sequence[Site]) -> set[str]:
    return set(map(str, sites))


# What each set must hold, as regular expressions over site names: not the rule of targets.py.
SETS = {
    "text-attention": r"text\.\d+\.(q|k|v|out)",
    "vision-attention": r"vision\.\d+\.(q|k|v|out)|vision\.pool_q",
    "attention": r".*\.\d+\.(q|k|v|out)|vision\.pool_q",
    "text-mlp": r"text\.\d+\.fc.",
    "vision-mlp": r"vision\.\d+\.(fc.|gate)|vision\.pool_fc1",
    "mlp": r".*\.(fc.|gate|pool_fc1)",
    "pooling": r"vision\.pool_.*",
    "convolutions": r"vision\.(patch_embedding|4\.conv_dw|4\.downsample)",
    "projection": r".*\.proj(_fc1)?",
    "linear": r".*\.\d+\.(?!conv|down).*|.*\.proj(_fc1)?|vision\.pool_.*",
    "all-linear": r".*\.\d+\.(?!conv|down).*|.*\.proj(_fc1)?|vision\.pool_.*",
    "linear-text": r"text\.\d+\..*",
    "text-matrices": r"text\.\d+\..*|text\.token_embedding|text\.proj",
    "text-linear": r"text\.\d+\..*",
    "linear-vision": r"vision\.\d+\.(?!conv|down).*|vision\.pool_.*",
    "vision-linear": r"vision\.\d+\.(?!conv|down).*|vision\.pool_.*",
    "embedding": r".*\.(token|position)_embedding",
    "linear+embedding": r"(?!vision\.(patch|4\.conv|4\.down)).*",
    "linear+embedding-text": r"text\..*|vision\.proj(_fc1)?",
    "text-linear+embedding": r"text\..*|vision\.proj(_fc1)?",
    "linear+embedding-vision": r"(?!vision\.(patch|4\.conv|4\.down))vision\..*|text\.proj",
    "vision-linear+embedding": r"(?!vision\.(patch|4\.conv|4\.down))vision\..*|text\.proj",
    "all": r".*",
}


def test_every_set_holds_what_its_name_says() -> None:
    """`--lora-targets NAME` adapts other places than NAME says."""
    assert set(SETS) == set(TARGET_SETS)
    for name, pattern in SETS.items():
        expected = {site for site in NAMES if re.fullmatch(pattern, site)}
        assert names(select_sites(SITES, name)) == expected, name


def vit_l_336() -> nn.Module:
    config = CLIPConfig(
        text_config={"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        projection_dim=768,
    )
    with torch.device("meta"):
        return CLIPModel(config)


def added(model: nn.Module, targets: str, r: int) -> int:
    refs = as_clip(model).site_refs
    shapes = (refs[site].lora_shapes(r) for site in select_sites(list(refs), targets))
    return sum(torch.Size(shape).numel() for pair in shapes for shape in pair)


def test_published_counts_of_vit_l() -> None:
    """The six target sets of the published table have other numbers of weights than it says."""
    model = vit_l_336()
    base = sum(p.numel() for p in model.parameters())
    assert base == 427_944_193
    assert {name: base + added(model, name, 16) for name in SETS if name.startswith("linear")} == {
        "linear": 437_729_537,
        "linear-text": 430_598_401,
        "linear-vision": 435_022_081,
        "linear+embedding": 438_571_489,
        "linear+embedding-text": 431_467_985,
        "linear+embedding-vision": 435_100_945,
    }


def test_published_count_of_vit_b() -> None:
    """The guide's adapter, rank 16 on the text attention of ViT-B-32, has not 786,432 weights."""
    config = open_clip.get_model_config("ViT-B-32")
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    assert added(model, "text-attention", 16) == 786_432
    assert added(model, guide_targets(["in_proj", "out_proj"]), 16) == 786_432


towers = st.sampled_from(["text", "vision", "*"])
blocks = st.one_of(
    st.just("*"),
    st.integers(0, 14).map(str),
    st.integers(1, 13).map(lambda n: f"-{n}"),
    st.tuples(st.integers(0, 13), st.integers(0, 13)).map(lambda pair: f"{pair[0]}-{pair[1]}"),
)
roles = st.sampled_from([*BLOCK, "*"])
outside = st.sampled_from(["token_embedding", "position_embedding", "patch_embedding", "proj", "*", "q"])
Pattern = tuple[str, list[str] | None, list[str]]
patterns = st.one_of(
    st.tuples(towers, st.lists(blocks, min_size=1, max_size=2), st.lists(roles, min_size=1, max_size=3)),
    st.tuples(towers, st.none(), st.lists(outside, min_size=1, max_size=2)),
)
terms = st.one_of(patterns, st.sampled_from(sorted(SETS)))


def holds(name: str, tower: str, block: str | None, role: str) -> bool:
    """Whether one site is meant by one tower, block and role of a pattern."""
    parts = name.split(".")
    if tower not in ("*", parts[0]):
        return False
    if block is None:
        return role == "*" or (len(parts) == 2 and parts[1] == role)
    if len(parts) == 2 or role not in ("*", parts[2]):
        return False
    numbers = list(range(DEPTH[parts[0]]))
    if block.startswith("-"):
        from_end = int(block[1:])
        return from_end <= len(numbers) and numbers[len(numbers) - from_end] == int(parts[1])
    if "-" in block:
        first, last = block.split("-")
        return int(parts[1]) in range(int(first), int(last) + 1)
    return block in ("*", parts[1])


def naive(term: Pattern | str) -> set[str] | None:
    """Sites of a term; None where a part of it means no site."""
    if isinstance(term, str):
        return {name for name in NAMES if re.fullmatch(SETS[term], name)}
    tower, numbers, wanted = term
    found: set[str] = set()
    for block in numbers or [None]:
        for role in wanted:
            part = {name for name in NAMES if holds(name, tower, block, role)}
            if not part:
                return None
            found |= part
    return found


def written(term: Pattern | str) -> str:
    if isinstance(term, str):
        return term
    return ".".join([term[0], *(["+".join(term[1])] if term[1] else []), "+".join(term[2])])


@given(st.lists(st.tuples(st.sampled_from(["", "-", "!"]), terms), min_size=1, max_size=4))
@example([("", ("text", ["-1"], ["q"])), ("-", ("*", ["11"], ["*"]))])
def test_expressions_mean_what_they_say(expression: list[tuple[str, Pattern | str]]) -> None:
    """An expression adapts a place it does not name, misses one, or ignores a part that matches nothing."""
    text = ",".join(sign + written(term) for sign, term in expression)
    expected: set[str] | None = set()
    for sign, term in expression:
        part = naive(term)
        if part is None:
            expected = None
            break
        expected = expected - part if sign else expected | part
    if not expected:
        with pytest.raises(cg.errors.TargetError):
            select_sites(SITES, text)
        return
    found = select_sites(SITES, text)
    assert names(found) == expected
    assert found == [site for site in SITES if str(site) in expected]
    assert select_sites(SITES, [sign + written(term) for sign, term in expression]) == found


@given(st.one_of(st.text(), st.text(alphabet="textvison.*+-!,0123456789qkfcproj_ ²¼")))
@example("text.².q")
@example("text.*.q+vv")
@example("--text.*")
@example(",")
def test_any_text_is_matched_or_refused(expression: str) -> None:
    """A slip of the keyboard ends in a traceback, or in no adapter at all."""
    message = ""
    try:
        assert select_sites(SITES, expression)
    except cg.errors.TargetError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
    assert not message or re.search("near misses|target sets are|leave no site", message)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("text.0.q,v", {"text.0.q", "text.0.v"}),
        ("text.0.q,k+v", {"text.0.q", "text.0.k", "text.0.v"}),
        ("text.0.*,-text.0.q,k,fc1,fc2", {"text.0.v", "text.0.out"}),
        (" text.0.q , vision.proj ", {"text.0.q", "vision.proj"}),
        ("text.10-11.q", {"text.10.q", "text.11.q"}),
        ("*.-1.out", {"text.11.out", "vision.4.out"}),
        ("text.*,!text.*.*", {"text.token_embedding", "text.position_embedding", "text.proj"}),
    ],
)
def test_written_examples(expression: str, expected: set[str]) -> None:
    """The examples of the documentation do not mean what it says."""
    assert names(select_sites(SITES, expression)) == expected


@pytest.mark.parametrize(
    ("expression", "near"),
    [
        ("text-atention", "text-attention"),
        ("text.3.qq", "text.3.q"),
        ("vision.patch_embeding", "vision.patch_embedding"),
        ("text.*.q+vv", "text"),
        ("text.12.q", "text.11.q"),
        ("txt.1.q", "text.1.q"),
    ],
)
def test_near_misses(expression: str, near: str) -> None:
    """A misspelt target is refused without saying what it could have been."""
    with pytest.raises(
        cg.errors.TargetError, match=f"'{re.escape(expression)}' matches no site.*near misses: .*{near}"
    ):
        select_sites(SITES, expression)


def test_overrides_that_match_nothing(tiny_hf: nn.Module) -> None:
    """A rank for a site that is not adapted is ignored, and the run trains at another rank than asked."""
    for patterns in ({"rank_pattern": {"text.1.fc1": 4}}, {"alpha_pattern": {"text.*.qq": 4.0}}):
        with pytest.raises(cg.errors.TargetError, match=r"near misses: .*text\.[01]\.|target sets are"):
            cg.apply_lora(tiny_hf, targets="text.*.q,v", **patterns)
    assert all(p.requires_grad for p in tiny_hf.parameters())
    cg.apply_lora(tiny_hf, targets="text.*.q,v", rank_pattern={"text.0.*": 4})
    assert {layer.r for layer in require_lora(tiny_hf).layers.values()} == {4, 16}


@given(st.lists(st.tuples(patterns, st.integers(1, 64)), max_size=4), patterns)
def test_overrides_mean_what_they_say(overrides: list[tuple[Pattern, int]], adapted: Pattern) -> None:
    """A per-site rank goes to another site, or an earlier override wins over a later one."""
    chosen = naive(adapted) or set(NAMES)
    expected: dict[str, int] = {}
    refused = False
    for term, value in {written(t): (t, v) for t, v in overrides}.values():
        part = (naive(term) or set()) & chosen
        refused = refused or not part
        expected.update(dict.fromkeys(part, value))
    pattern = {written(term): value for term, value in overrides}
    sites = [site for site in SITES if str(site) in chosen]
    if refused:
        with pytest.raises(cg.errors.TargetError):
            override_values(SITES, sites, pattern)
    else:
        assert {
            str(site): value for site, value in override_values(SITES, sites, pattern).items()
        } == expected


def test_guide_targets() -> None:
    """The guide's --lora-target-modules adapt something else than the guide's text attention."""
    found = select_sites(SITES, guide_targets(["in_proj", "out_proj"]))
    assert found == select_sites(SITES, "text-attention")
    assert select_sites(SITES, guide_targets([" c_fc ", "c_proj"])) == select_sites(SITES, "text-mlp")
    for wrong, message in ((["in_pro"], "'in_pro' is unknown; allowed are in_proj"), ([], "is empty")):
        with pytest.raises(cg.errors.TargetError, match=message):
            guide_targets(wrong)
