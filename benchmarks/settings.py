"""Sizes of a benchmark run: the full one, and the quick one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
WORK = ROOT / ".work"
RESULTS = ROOT / "results"
PEER_WORKERS = 2


@dataclass(frozen=True)
class Settings:
    """Sizes of one run.

    Attributes:
        images: generated JPEGs of 500x375; one caption each, so that no batch holds an image twice.
        batch_size: pairs a training step.
        run_epochs: epochs of our training run, the first from cold.
        epochs: epochs of the run that the table speaks of; what was not run is scaled from single steps.
        warmup, steps: untimed and timed steps of a peer in each repeat.
        repeats: rounds; in every round each contestant runs once.
        retries: of a measurement during which the machine's speed moved.
        both_towers_batch: pairs a step where both towers train.
        encode_images: JPEGs that each encoder is timed on.
        emoji_scenes, emoji_test: training and test scenes of the embedded default.
        retrieval_rows: gallery size at which the libraries that build the whole matrix still fit.
        retrieval_large: gallery size for ours alone; 0 leaves it out.
        parity_batch, parity_steps: of the check that all compute the same thing.
    """

    quick: bool
    images: int
    batch_size: int
    run_epochs: int
    epochs: int
    warmup: int
    steps: int
    repeats: int
    both_towers_batch: int
    encode_images: int
    emoji_scenes: int
    emoji_test: int
    retrieval_rows: int
    retrieval_large: int
    parity_batch: int
    parity_steps: int
    seed: int = 0
    retries: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return self.images // self.batch_size

    @property
    def data(self) -> Path:
        """Folder of the generated images and captions; another size gets another folder."""
        return WORK / f"photos-{self.images}-{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


FULL = Settings(
    quick=False,
    images=2048,
    batch_size=64,
    run_epochs=3,
    epochs=10,
    warmup=1,
    steps=3,
    repeats=3,
    both_towers_batch=32,
    encode_images=512,
    emoji_scenes=4000,
    emoji_test=1000,
    retrieval_rows=20_000,
    retrieval_large=100_000,
    parity_batch=16,
    parity_steps=5,
    retries=2,
)
QUICK = Settings(
    quick=True,
    images=512,
    batch_size=64,
    run_epochs=2,
    epochs=10,
    warmup=1,
    steps=1,
    repeats=1,
    both_towers_batch=16,
    encode_images=128,
    emoji_scenes=400,
    emoji_test=200,
    retrieval_rows=4000,
    retrieval_large=0,
    parity_batch=8,
    parity_steps=3,
)
