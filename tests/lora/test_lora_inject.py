"""Attaching LoRA to a model, switching it, counting it, and taking it off again."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import open_clip
import pytest
import torch
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.lora.state import require_lora
from clipgraft.models.clip import as_clip
from explicit_lora import explicit_model, features, inputs, largest, loss_of, randomise_lora
from tiny_models import TINY_OPENCLIP

LAYOUTS = ("tiny_openclip", "tiny_openclip_4x", "tiny_hf")
layouts = pytest.mark.parametrize("layout", LAYOUTS)
# With a site in one block of one tower, all other blocks are the untouched base's.
targets_sets = pytest.mark.parametrize("targets", ["all", "text.1.*", "vision.0.q"])


@pytest.fixture
def model(layout: str, request: pytest.FixtureRequest) -> nn.Module:
    return request.getfixturevalue(layout)


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def modes() -> list[tuple[bool, bool, bool]]:
    """Training, gradients, autocast."""
    return list(itertools.product((False, True), repeat=3))


def run_in(mode: tuple[bool, bool, bool], model: nn.Module) -> tuple[Tensor, Tensor]:
    train, grad, autocast = mode
    model.train(train)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return features(model, *inputs(model))


@layouts
@targets_sets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_0_disabled_and_removed_are_the_base(model: nn.Module, targets: str, dtype: torch.dtype) -> None:
    """A new, a disabled or a removed adapter changes what the base computes, if only in the last bit."""
    model.to(dtype)
    base = {mode: run_in(mode, model) for mode in modes()}
    cg.apply_lora(model, r=4, targets=targets, dropout=0.2)
    wrong = [("new", mode) for mode in modes() if not same(run_in(mode, model), base[mode])]
    randomise_lora(model)
    cg.disable_lora(model)
    wrong += [("disabled", mode) for mode in modes() if not same(run_in(mode, model), base[mode])]
    cg.remove_lora(model)
    wrong += [("removed", mode) for mode in modes() if not same(run_in(mode, model), base[mode])]
    assert wrong == []


def test_step_0_at_the_size_of_a_real_model() -> None:
    """torch picks other kernels for real widths, so that a tiny model could hide a changed bit."""
    config = copy.deepcopy(TINY_OPENCLIP)
    config["vision_cfg"].update(width=768, layers=1, head_width=64, image_size=64)
    config["text_cfg"].update(width=512, layers=1, heads=8, vocab_size=49408)
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    pixels, ids = torch.randn(2, 3, 64, 64), inputs(model, batch=2)[1]
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            base = features(model, pixels, ids)
        cg.apply_lora(model, targets="all")
        with context():
            assert same(features(model, pixels, ids), base)
        cg.remove_lora(model)
        with context():
            assert same(features(model, pixels, ids), base)


@layouts
def test_a_base_that_was_frozen_already(model: nn.Module) -> None:
    """After lock_text_tower, as the guide has it, a new adapter changes the last bits of training."""
    model.requires_grad_(False)
    compared = [mode for mode in modes() if mode[0] or not mode[1]]
    base = {mode: run_in(mode, model) for mode in compared}
    cg.apply_lora(model, targets="all")
    assert [mode for mode in compared if not same(run_in(mode, model), base[mode])] == []
    cg.remove_lora(model)
    assert not any(p.requires_grad for p in model.parameters())


@layouts
def test_only_the_adapter_trains(model: nn.Module) -> None:
    """An optimiser step changes the base, or leaves the adapter as it was."""
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    loss_of(features(model, *inputs(model))).backward()  # a base that was being trained
    cg.apply_lora(model, r=2, targets="all", dropout=0.1)
    model.train()
    layers = require_lora(model).layers
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # after one step either A or B is still where it started
        optimiser.zero_grad()
        loss_of(features(model, *inputs(model))).backward()
        assert cg.lora.verify_gradients(model) == 2 * len(layers)
        optimiser.step()
    assert all(layer.lora_A.any() and layer.lora_B.any() for layer in layers.values())
    cg.remove_lora(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@layouts
def test_removal_restores_names_order_and_training(model: nn.Module) -> None:
    """After remove_lora a checkpoint or an optimiser state of the base no longer fits the model."""
    as_clip(model).logit_scale.requires_grad_(False)
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    cg.apply_lora(model, targets="all")
    cg.remove_lora(model)
    assert list(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == kinds
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == parameters
    kept = {"_clipgraft_fingerprint", "_clipgraft_lock"}
    assert not any(
        "clipgraft" in key for module in model.modules() for key in vars(module) if key not in kept
    )
    with pytest.raises(cg.errors.AdapterError, match="carries no LoRA"):
        cg.remove_lora(model)


@layouts
def test_the_temperature_trains_only_when_asked(model: nn.Module) -> None:
    """The temperature of the base drifts, or stays with the base after its adapter was taken off."""
    scale = as_clip(model).logit_scale
    original = scale.detach().clone()
    cg.apply_lora(model, targets="text-attention")
    assert not scale.requires_grad
    cg.remove_lora(model)
    cg.apply_lora(model, targets="text-attention", train_logit_scale=True)
    assert scale.requires_grad
    assert cg.count_parameters(model).trainable == cg.count_parameters(model).lora + 1
    with torch.no_grad():
        scale.fill_(1.5)
    with cg.lora_disabled(model):
        assert torch.equal(scale, original)
        with cg.lora_disabled(model):
            pass
        assert torch.equal(scale, original)
    assert scale.item() == 1.5
    cg.disable_lora(model)
    cg.disable_lora(model)
    assert torch.equal(scale, original)
    cg.enable_lora(model)
    cg.enable_lora(model)
    assert scale.item() == 1.5
    cg.remove_lora(model)
    assert torch.equal(scale, original)


@layouts
def test_lora_disabled_restores(model: nn.Module) -> None:
    """An exception while the base is being looked at leaves the adapter switched off for good."""
    cg.apply_lora(model, targets="all")
    randomise_lora(model)
    pixels, ids = inputs(model)
    on = features(model, pixels, ids)
    with pytest.raises(ZeroDivisionError), cg.lora_disabled(model):
        raise ZeroDivisionError
    with cg.lora_disabled(model):
        off = features(model, pixels, ids)
    assert largest(on, off) > 0.01
    assert same(features(model, pixels, ids), on)
    cg.disable_lora(model)
    with cg.lora_disabled(model):
        pass
    assert same(features(model, pixels, ids), off)


@layouts
def test_deep_copies_are_independent(model: nn.Module) -> None:
    """Training, switching or removing the adapter of a copy changes the original, or the other way round."""
    cg.apply_lora(model, targets="all", train_logit_scale=True)
    updates = randomise_lora(model)
    pixels, ids = inputs(model)
    adapted = features(model, pixels, ids)
    other = copy.deepcopy(model)
    assert same(features(other, pixels, ids), adapted)
    ours = {id(p) for p in model.parameters()}
    assert not ours & {id(p) for p in other.parameters()}
    assert not ours & {id(p) for layer in require_lora(other).layers.values() for p in layer.parameters()}
    randomise_lora(other, seed=1)
    assert same(features(model, pixels, ids), adapted)
    cg.remove_lora(other)
    assert same(features(model, pixels, ids), adapted)
    third = copy.deepcopy(model)
    cg.remove_lora(model)
    assert same(features(third, pixels, ids), adapted)
    assert largest(features(explicit_model(other, updates), pixels, ids), adapted) < 1e-3
    assert same(features(model, pixels, ids), features(other, pixels, ids))


@layouts
def test_pickling(model: nn.Module) -> None:
    """torch.save of a whole adapted model writes a file that cannot be read back."""
    cg.apply_lora(model, targets="linear")
    randomise_lora(model)
    other = pickle.loads(pickle.dumps(model))
    pixels, ids = inputs(model)
    assert same(features(other, pixels, ids), features(model, pixels, ids))
    cg.remove_lora(other)
    assert largest(features(other, pixels, ids), features(model, pixels, ids)) > 0.01


@layouts
def test_dropout_acts_on_the_adapter_path_only(model: nn.Module) -> None:
    """Dropout also drops the base's activations, is on in use, or is left out for some kind of site."""
    pixels, ids = inputs(model)
    for targets in (
        "text.1.q",
        "text.1.out",
        "vision.0.fc1",
        "vision.proj",
        "text.proj",
        "vision.patch_embedding",
    ):
        plain = copy.deepcopy(model)
        base = features(plain, pixels, ids)
        cg.apply_lora(plain, r=4, targets=targets, dropout=0.9)
        updates = randomise_lora(plain)
        plain.eval()
        wanted = features(explicit_model(model, updates), pixels, ids)
        assert largest(features(plain, pixels, ids), wanted) < 1e-4, targets
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                plain.train()
                one, two = features(plain, pixels, ids), features(plain, pixels, ids)
                assert largest(one, two) > 1e-3, targets
                require_lora(plain).layers[cg.models.Site.parse(targets)].lora_B.data.zero_()
                assert largest(features(plain, pixels, ids), base) < 1e-5, targets
            randomise_lora(plain)


@layouts
@pytest.mark.parametrize("site", ["vision.proj", "text.proj"])
def test_dropout_has_the_right_mean(model: nn.Module, site: str) -> None:
    """Training with dropout sees an update of another size than use does."""
    cg.apply_lora(model, targets=site, dropout=0.5)
    randomise_lora(model)
    pixels, ids = inputs(model, batch=1)
    tower = 0 if site.startswith("vision") else 1
    wanted = features(model.eval(), pixels, ids)[tower]
    with torch.no_grad(), cg.lora_disabled(model):
        base = features(model, pixels, ids)[tower]
    model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        repeated = features(model, pixels.expand(500, -1, -1, -1), ids.expand(500, -1))[tower]
    size = (wanted - base).norm()
    spread = (repeated - wanted).norm(dim=-1).mean() / size
    assert spread > 0.3
    assert (repeated.mean(0) - wanted).norm() / size < 5 * spread / math.sqrt(500)


def test_ids_and_positions_have_no_dropout(tiny_openclip: nn.Module) -> None:
    """Dropout of ids would look up wrong tokens, dropout of positions is defined nowhere."""
    cg.apply_lora(tiny_openclip, targets="embedding", dropout=0.9)
    randomise_lora(tiny_openclip)
    tiny_openclip.train()
    pixels, ids = inputs(tiny_openclip)
    assert same(features(tiny_openclip, pixels, ids), features(tiny_openclip, pixels, ids))


def test_initial_weights(tiny_openclip: nn.Module) -> None:
    """A starts at zero, so that nothing trains, or at another scale than published results assume."""
    cg.apply_lora(tiny_openclip, r=64, targets="all")
    for site, layer in require_lora(tiny_openclip).layers.items():
        a, b = layer.lora_A.detach(), layer.lora_B.detach()
        if layer.kind in ("embedding", "table"):
            a, b = b, a
            assert a.std() == pytest.approx(1, rel=0.1), site
        else:
            bound = 1 / math.sqrt(a[0].numel())  # Kaiming uniform with a = √5
            assert 0.9 * bound < a.abs().max() <= bound, site
            assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.1), site
        assert not b.any(), site


def test_default_dtype_is_not_taken_over(tiny_hf: nn.Module) -> None:
    """Under torch.set_default_dtype(bfloat16) adapters would train in bf16 and stop learning."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        cg.apply_lora(tiny_hf)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in tiny_hf.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling(tiny_hf: nn.Module, rslora: bool) -> None:
    """Alpha is divided by the wrong thing, or a site's own rank and alpha are not used for its scale."""
    cg.apply_lora(
        tiny_hf,
        r=4,
        alpha=6,
        targets="text.*.q,v",
        use_rslora=rslora,
        rank_pattern={"text.*.q": 9, "text.0.q": 16},
        alpha_pattern={"text.-1.*": 2},
    )
    found = {str(site): (layer.r, layer.scaling) for site, layer in require_lora(tiny_hf).layers.items()}
    expected = {"text.0.q": (16, 6), "text.0.v": (4, 6), "text.1.q": (9, 2), "text.1.v": (4, 2)}
    scale = {site: alpha / (math.sqrt(r) if rslora else r) for site, (r, alpha) in expected.items()}
    assert found == {site: (r, pytest.approx(scale[site])) for site, (r, _) in expected.items()}
    cg.remove_lora(tiny_hf)
    cg.apply_lora(tiny_hf, r=8)
    assert {layer.scaling for layer in require_lora(tiny_hf).layers.values()} == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "LoraConfig: r: got 0, allowed is greater than or equal to 1$"),
        ({"r": 2.5}, "r: got 2.5, allowed is a whole number"),
        ({"alpha": -1}, "alpha: got -1, allowed is greater than 0"),
        ({"alpha": math.nan}, "alpha: got nan, allowed is a finite number"),
        ({"dropout": 1}, "dropout: got 1, allowed is a number from 0 to 0.99"),
        ({"rank_pattern": {"text.0.*": 0}}, r"rank_pattern: got 0 at 'text\.0\.\*'"),
        ({"alpha_pattern": {"text.0.*": 0}}, r"alpha_pattern: got 0 at 'text\.0\.\*'"),
        ({"r": -1, "dropout": 2}, "r: got -1, .*\nLoraConfig: dropout: got 2"),
    ],
)
def test_values_out_of_range(tiny_hf: nn.Module, options: dict, message: str) -> None:
    """A nonsense rank, alpha or dropout trains something useless instead of being refused."""
    with pytest.raises(cg.errors.ConfigError, match=message):
        cg.apply_lora(tiny_hf, **options)
    assert all(p.requires_grad for p in tiny_hf.parameters())


def test_lora_is_not_applied_twice(tiny_hf: nn.Module) -> None:
    """A second apply_lora silently stacks on the first."""
    assert cg.apply_lora(tiny_hf) == 8
    with pytest.raises(cg.errors.AdapterError, match="already carries LoRA"):
        cg.apply_lora(tiny_hf)
    for function in (cg.enable_lora, cg.disable_lora, cg.remove_lora):
        with pytest.raises(cg.errors.AdapterError, match="carries no LoRA"):
            function(open_clip.CLIP(**copy.deepcopy(TINY_OPENCLIP)))


def test_a_rank_far_above_what_a_weight_has_is_refused(tiny_hf: nn.Module) -> None:
    """`--lora-r 100000` would fill the memory, and train for hours what a small rank does."""
    with pytest.raises(
        cg.errors.ConfigError, match=r"r=100000 at text\.0\.\w+, whose weight is \d+x\d+: a rank"
    ):
        cg.apply_lora(tiny_hf, r=100_000)
    with pytest.raises(
        cg.errors.ConfigError, match=r"alpha: got 1e\+300, allowed is a number from 1e-09 to 1e\+06"
    ):
        cg.apply_lora(tiny_hf, r=2, alpha=1e300)
