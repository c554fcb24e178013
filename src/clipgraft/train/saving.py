"""What a run keeps: an adapter or the fine-tuned model of an epoch, and the last one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from clipgraft.adapters.adapter_file import save_adapter
from clipgraft.files import atomic_path
from clipgraft.lora.state import lora_state, require_lora
from clipgraft.models.clip import Clip
from clipgraft.models.export import save_model
from clipgraft.writing import size_of


@dataclass(frozen=True)
class Saver:
    """Writes into a run folder; `lora_only` leaves out the whole model beside each adapter."""

    clip: Clip
    folder: Path
    lora_only: bool

    def save_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """`checkpoints/epoch_N`: the adapter and, unless `lora_only`, `epoch_N.pt`; or the whole model."""
        target = self.folder / "checkpoints" / f"epoch_{epoch}"
        if lora_state(self.clip) is None:
            save_model(self.clip, target, epoch)
            return
        save_adapter(self.clip, target, metrics, overwrite=True)  # the run folder is ours
        if not self.lora_only:
            self._save_with_base(target.with_name(f"epoch_{epoch}.pt"), epoch)

    def save_final(self, epoch: int, metrics: Mapping[str, float]) -> Path:
        """The epoch that the run keeps: `adapter/`, or where `save_epoch` puts, or has put, its model."""
        if lora_state(self.clip) is not None:
            return save_adapter(self.clip, self.folder / "adapter", metrics, overwrite=True)
        folder = self.folder / "checkpoints" / f"epoch_{epoch}"
        file = folder.with_name(f"epoch_{epoch}.pt")
        if not folder.is_dir() and not file.is_file():
            self.save_epoch(epoch, metrics)
        return folder if folder.is_dir() else file

    def _save_with_base(self, path: Path, epoch: int) -> None:
        whole = {
            "epoch": epoch,
            "name": self.folder.name,
            "state_dict": self.clip.model.state_dict(),
            "lora_config": {**asdict(self.clip.source), **asdict(require_lora(self.clip).chosen().settings)},
        }
        with atomic_path(path, size_of(whole)) as temporary:
            torch.save(whole, temporary)
