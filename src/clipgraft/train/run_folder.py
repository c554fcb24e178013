"""The folder of a run, laid out as open_clip's: params.txt, out.log, checkpoints/, and events beside them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft.errors import ConfigError
from clipgraft.files import write_text
from clipgraft.train.checkpoint import LATEST

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

log = logging.getLogger("clipgraft")


class RunFolder:
    """Writes what a run reports; one instance a run, closed at its end."""

    def __init__(self, path: Path, params: Mapping[str, Any], resume: bool) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.latest = self.checkpoints / LATEST
        if not resume and (path / "params.txt").exists():
            raise ConfigError(
                f"run {path} exists already: add --resume latest to continue it, or choose another --name"
            )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--logs: cannot make {self.checkpoints}: {error.strerror}") from error
        write_text(path / "params.txt", "".join(f"{key}: {value}\n" for key, value in sorted(params.items())))
        self._handler = logging.FileHandler(path / "out.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s"))
        log.addHandler(self._handler)
        self._board: SummaryWriter | None = None

    def rewind(self, step: int) -> None:
        """Forget events after `step`: a resumed run writes them again."""
        events = self.path / "events.jsonl"
        if events.exists():
            lines = [line for line in events.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            write_text(events, "".join(f"{line}\n" for line in kept))

    def event(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Append one line to events.jsonl and the same numbers to TensorBoard."""
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as events:
            events.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._board is None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(self.path / "tensorboard"))
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        log.removeHandler(self._handler)
        self._handler.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
