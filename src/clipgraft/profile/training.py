"""Count what a training step costs, of full tuning and of LoRA on target sets, and what each set would train.

A product x·W costs its multiply-adds once forward; once more in the backward pass for the gradient of x, if
anything that x was computed from trains; and once more for the gradient of W, if W trains. So

    full tuning      3 × forward (less the first layer's x, which are pixels)
    LoRA             forward; the gradient of x only above the lowest adapted site; no gradient of any W; and
                     of each factor both gradients, 2 × their own products
    a frozen tower   forward alone, and where preprocessing is deterministic once for each image or text in
                     all of training (`cached_macs`)

Products of activations with each other have two such x. Attention kernels keep no scores and compute them
again: their backward pass is 5 products of 2 forward. None of these rules is programmed here: the tower is
traced with those weights trainable that train, and autograd itself tells which gradients each product needs.

Backward passes of anything but products, and the optimiser's dozen operations a weight, are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from clipgraft.errors import TargetError
from clipgraft.lora.inject import apply_lora, remove_lora
from clipgraft.lora.state import lora_state
from clipgraft.lora.targets import TARGET_SETS, select_sites
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.family import is_lora
from clipgraft.models.sites import Tower
from clipgraft.profile.forward import ClipInputs, inputs_of, trace_tower
from clipgraft.profile.trace import Trace, on_meta
from clipgraft.results import Result, Results

_BYTES_OF_A_WEIGHT = 4


@dataclass(frozen=True, repr=False)
class TargetCost(Result):
    """A LoRA adapter on a target set.

    Attributes:
        targets: the set or expression; of sets that choose the same sites, the first.
        r: rank.
        sites: how many it adapts.
        parameters: of A and B together.
        megabytes: of the adapter's file, fp32, in 10⁶ bytes; the header aside.
        share: of the base's weights.
    """

    targets: str
    r: int
    sites: int
    parameters: int
    megabytes: float
    share: float


def target_costs(model: ClipLike, targets: Iterable[str] | None = None, r: int = 16) -> Results[TargetCost]:
    """Count the parameters and bytes of adapters of rank r.

    Args:
        model: a `Clip` or raw model, on the meta device too.
        targets: sets or expressions; by default every named set that fits the model.
        r: rank.

    Raises:
        TargetError: one of `targets` matches nothing.
    """
    clip = as_clip(model)
    refs = clip.site_refs
    total = sum(p.numel() for name, p in clip.model.named_parameters() if not is_lora(name))
    names = distinct_sets(model) if targets is None else tuple(targets)
    costs = []
    for name in names:
        chosen = select_sites(list(refs), name)
        shapes = [shape for site in chosen for shape in refs[site].lora_shapes(r)]
        parameters = sum(torch.Size(shape).numel() for shape in shapes)
        megabytes = parameters * _BYTES_OF_A_WEIGHT / 1e6
        costs.append(TargetCost(name, r, len(chosen), parameters, megabytes, parameters / total))
    return Results(costs)


def distinct_sets(model: ClipLike, names: Iterable[str] = tuple(TARGET_SETS)) -> tuple[str, ...]:
    """Return the target sets that match this model; of sets that choose the same sites, the first."""
    sites = as_clip(model).sites
    found: dict[tuple[object, ...], str] = {}
    for name in names:
        try:
            found.setdefault(tuple(select_sites(sites, name)), name)
        except TargetError:
            continue
    return tuple(found.values())


FULL = "full"


@dataclass(frozen=True)
class TowerTraining:
    """One tower in a training step.

    Attributes:
        tower: which.
        frozen: nothing in it trains.
        forward_macs, backward_macs: multiply-adds of products.
        forward_flops: `clipgraft.profile.ops`.
        saved_bytes: what it keeps for the backward pass, weights aside.
    """

    tower: Tower
    frozen: bool
    forward_macs: int
    backward_macs: int
    forward_flops: int
    saved_bytes: int


@dataclass(frozen=True, repr=False)
class TrainingCost(Result):
    """A step of training on a batch of pairs.

    Attributes:
        targets: target set, or `full`.
        r: rank; 0 for full tuning.
        trainable: number of weights that train.
        weight_bytes: of all weights.
        gradient_bytes: of the gradients.
        optimizer_bytes: of AdamW's two moments.
        text, vision: the towers; None where there is none, or a table of features.
    """

    _shows = ("targets", "r", "trainable", "macs", "cached_macs", "memory_bytes")

    targets: str
    r: int
    trainable: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    text: TowerTraining | None
    vision: TowerTraining | None

    @property
    def towers(self) -> tuple[TowerTraining, ...]:
        """Those that there are: both, or the one of a tower alone."""
        return tuple(tower for tower in (self.text, self.vision) if tower is not None)

    @property
    def macs(self) -> int:
        """Of a step, forward and backward."""
        return sum(tower.forward_macs + tower.backward_macs for tower in self.towers)

    @property
    def cached_macs(self) -> int:
        """Of a step that takes the features of frozen towers from a cache."""
        running = (tower for tower in self.towers if not tower.frozen)
        return sum(tower.forward_macs + tower.backward_macs for tower in running)

    @property
    def flops(self) -> int:
        """Of a step: all of the forward pass, and the products of the backward pass."""
        return sum(tower.forward_flops + 2 * tower.backward_macs for tower in self.towers)

    @property
    def saved_bytes(self) -> int:
        return sum(tower.saved_bytes for tower in self.towers)

    @property
    def memory_bytes(self) -> int:
        """Weights, gradients, moments and what is kept for the backward pass."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.saved_bytes


def training_costs(
    model: ClipLike,
    targets: Iterable[str] | None = None,
    r: int = 16,
    *,
    batch: int = 1,
    text_tokens: int | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Results[TrainingCost]:
    """Count a training step of full tuning, then of LoRA of rank r on each target set. Nothing is computed.

    Adapters that the model carries are left out.

    Args:
        model, batch, text_tokens, image_size: as for `costs`.
        targets: sets or expressions; by default every named set that fits the model.
        r: rank.

    Raises:
        ModelError: the model takes no such texts or images.
        TargetError: one of `targets` matches nothing.
    """
    given = as_clip(model)
    base = Clip(on_meta(given.model), given.family, source=given.source)
    if lora_state(base) is not None:
        remove_lora(base)
    inputs = inputs_of(base, batch, text_tokens, image_size)
    base.model.requires_grad_(False)
    frozen = {tower: trace_tower(base, tower, given) for tower, given in inputs.items()}
    names = distinct_sets(base) if targets is None else tuple(targets)
    whole = Clip(on_meta(base.model), base.family)
    whole.model.requires_grad_(True)
    costs = [_cost(whole, FULL, 0, inputs, frozen)]
    for name in names:
        adapted = Clip(on_meta(base.model), base.family)
        with torch.device("meta"):
            apply_lora(adapted, r=r, targets=name)
        costs.append(_cost(adapted, name, r, inputs, frozen))
    return Results(costs)


def _cost(clip: Clip, name: str, r: int, inputs: ClipInputs, frozen: dict[Tower, Trace]) -> TrainingCost:
    state = lora_state(clip)
    towers: dict[Tower, TowerTraining] = {}
    for tower, given in inputs.items():
        trains = state is None or state.chosen().touches(tower)
        found = trace_tower(clip, tower, given) if trains else frozen[tower]
        towers[tower] = TowerTraining(
            tower=tower,
            frozen=not trains,
            forward_macs=found.total.macs,
            backward_macs=found.total.backward_macs,
            forward_flops=found.total.flops,
            saved_bytes=found.saved_bytes if trains else 0,
        )
    weights = list(clip.model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    gradients = sum(weight.numel() * weight.element_size() for weight in trained)
    return TrainingCost(
        targets=name,
        r=r,
        trainable=sum(weight.numel() for weight in trained),
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        gradient_bytes=gradients,
        optimizer_bytes=2 * gradients,
        text=towers.get("text"),
        vision=towers.get("vision"),
    )
