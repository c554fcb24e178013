"""Options of encoding."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from clipgraft.options import Batch, GpuShare, Options, Points, ShardRows, UserPath, Workers
from clipgraft.search.manifest import Dtype

_RAY = ("ray_address", "ray_workers", "ray_gpus_per_worker")


class EncodeArgs(Options):
    """Options of `encode_folder`: what to encode, and with which resources."""

    texts: bool = Field(False, description="encode texts: lines of a .txt file, or the captions of a table")
    dtype: Dtype = Field("float16", description="type of the vectors")
    shard_rows: ShardRows = Field(
        10_000, ge=1, description="items per file; a killed run loses only the unfinished file"
    )
    batch_size: Batch = Field(64, ge=1, description="images or texts encoded at once")
    workers: Workers = Field(2, ge=0, description="processes that decode images; 0: a thread")
    autocast: bool | None = Field(
        None, description="compute in bf16 (default: where that is faster; later runs go on likewise)"
    )
    int8: bool = Field(
        False,
        description="compute products in 8-bit integers, on CPUs with VNNI: faster than bf16, and needs a "
        "table of pairs for `gate` (later runs go on likewise)",
    )
    gate: UserPath | None = Field(
        None, description="table of images and captions on which the recall that int8 loses is measured"
    )
    max_recall_loss: Points = Field(
        1.0, ge=0, description="percentage points of recall@1, 5 or 10 that int8 may lose at most"
    )
    exact_preprocess: bool = Field(
        False, description="preprocess images exactly as the base's own transform does"
    )
    retry_errors: bool = Field(
        False, description="retry items that could not be used, even if they have not changed"
    )
    engine: Literal["local", "ray"] = Field(
        "local", description="what decodes and encodes: this process, or a Ray cluster"
    )
    ray_address: str | None = Field(
        None,
        min_length=1,
        description="auto, ray://HOST:PORT, or local: a cluster on this machine while the run lasts "
        "(default: RAY_ADDRESS, else local)",
    )
    ray_workers: Workers | None = Field(
        None, ge=1, description="processes with a model (default: as many as there is room for)"
    )
    ray_gpus_per_worker: GpuShare | None = Field(
        None, ge=0, description="GPUs per worker, such as 0.5 (default: 1 if the model is on a GPU, else 0)"
    )

    def faults(self) -> list[str]:
        """List options that contradict each other."""
        given = [name for name in _RAY if getattr(self, name) is not None]
        found = [f"`{name}`: goes with `engine='ray'`; add that" for name in given if self.engine != "ray"]
        if self.gate is not None and not self.int8:
            found.append("`gate`: goes with `int8`; add that")
        if self.int8 and self.autocast is False:
            found.append("`int8` computes in bf16 what it does not in integers: leave fp32 out")
        return found
