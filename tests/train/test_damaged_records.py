"""Checkpoints, events and cells with wrong values: one line that names file and field, nothing loaded."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import clipgraft as cg
from clipgraft.train.cells import write_finished
from clipgraft.train.checkpoint import Position, load_checkpoint, recorded_settings, save_checkpoint
from clipgraft.train.run_folder import read_events
from clipgraft.train.sweep import Cell, CellResult, read_cell

SETTINGS: dict[str, Any] = {"lr": 1.0, "batch_size": 4}


def trained() -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("run") / "latest.pt"
    save_checkpoint(path, *trained(), Position(1, 2, 3), SETTINGS)
    value: dict[str, Any] = torch.load(path, weights_only=True)
    return value


def moment(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda state: state["optimizer"]["state"][0].update({name: value})


WRONG: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda s: s.update(format=2), "format is 2"),
    (lambda s: s.update(format=torch.zeros(2)), "format is a Tensor"),
    (lambda s: s.pop("random"), "random is missing"),
    (lambda s: s.update(random=[1]), "random is a list"),
    (lambda s: s.update(random=torch.zeros(3)), "random is no state of torch's random numbers"),
    (lambda s: s.update(position=5.0), "position is 5.0, and should be an object"),
    (lambda s: s.update(position={"epoch": "x"}), "position.epoch is 'x', and should be a whole number"),
    (lambda s: s.update(position={"epoch": -1}), "position.epoch is -1"),
    (lambda s: s.update(settings=None), "settings is None, and should be an object"),
    (lambda s: s.update(settings={"lr": torch.zeros(2)}), "settings.lr is no plain value"),
    (lambda s: s.update(settings={"lr": 10**5000}), ""),
    (lambda s: s.update(settings={"lr": 2.0, "batch_size": 4}), "other settings: lr (was 2.0, now 1.0)"),
    (lambda s: s["weights"].pop("bias"), "holds other trainable weights"),
    (lambda s: s["weights"].update(bias=torch.zeros(5)), "holds other trainable weights"),
    (lambda s: s["weights"].update(bias=torch.zeros(4, dtype=torch.complex64)), "holds other trainable"),
    (lambda s: s["weights"].update(bias=torch.zeros(4).to_sparse()), ""),
    (lambda s: s["weights"].update(bias=torch.empty(4, device="meta")), "holds other trainable weights"),
    (lambda s: s["weights"].update(bias=[0.0] * 4), "weights.bias is a list"),
    (lambda s: s["optimizer"].update(param_groups=[]), "holds other trainable weights"),
    (lambda s: s["optimizer"].update(state={0: {"step": 5}}), "optimizer.state[0].step is 5"),
    (lambda s: s["optimizer"]["state"].update({7: s["optimizer"]["state"][0]}), "holds other trainable"),
    (lambda s: s["optimizer"]["param_groups"][0].update(lr="x"), "optimizer.param_groups[0].lr is 'x'"),
    (moment("exp_avg", torch.zeros(3)), "holds other trainable weights"),
    (moment("exp_avg_sq", torch.zeros(4, 4, dtype=torch.int64)), "holds other trainable weights"),
    (moment("step", torch.tensor(-1e30)), "optimizer.state[0].step is no number"),
]


@pytest.mark.parametrize(("how", "fault"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_checkpoint_is_refused_before_anything_is_loaded(
    how: Callable[[dict[str, Any]], object], fault: str, whole: dict[str, Any], tmp_path: Path
) -> None:
    """`--resume` on a damaged or foreign checkpoint ended in a traceback, with half of it loaded."""
    state = copy.deepcopy(whole)
    how(state)
    path = tmp_path / "latest.pt"
    torch.save(state, path)
    model, optimizer = trained()
    before, rates = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(cg.errors.CheckpointError) as caught:
        load_checkpoint(path, model, optimizer, SETTINGS)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert fault in message
    assert message.isprintable()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert optimizer.state_dict()["param_groups"] == rates
    with contextlib.suppress(cg.errors.CheckpointError):  # of what it reads, all may be in order
        recorded_settings(path)


def test_a_checkpoint_does_not_bring_its_own_rates(whole: dict[str, Any], tmp_path: Path) -> None:
    """How is in the settings, which are compared; what else the file says would be trained with."""
    state = copy.deepcopy(whole)
    state["optimizer"]["param_groups"][0].update(betas=None, eps=-1)
    torch.save(state, tmp_path / "latest.pt")
    model, optimizer = trained()
    rates = copy.deepcopy(optimizer.state_dict()["param_groups"])
    assert load_checkpoint(tmp_path / "latest.pt", model, optimizer, SETTINGS) == Position(1, 2, 3)
    assert optimizer.state_dict()["param_groups"] == rates
    assert torch.equal(
        optimizer.state_dict()["state"][0]["exp_avg"], whole["optimizer"]["state"][0]["exp_avg"]
    )


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("x", "is not JSON"),
        ("[" * 100_000, "is nested more than 64 levels deep"),
        ("[]", "the whole is a list, and should be an object"),
        ('{"kind": "train", "loss": 1}', "step: the whole is None, and should be a whole number"),
        ('{"kind": "train", "step": "1", "loss": 1}', "step: the whole is '1'"),
        ('{"kind": 5, "step": 1}', "kind is 5, and should be text"),
        ('{"kind": "train", "step": 1}', "loss is missing"),
        ('{"kind": "train", "step": 1, "loss": NaN}', "loss is nan"),
        ('{"kind": "val", "step": 1, "acc1": [1]}', "acc1 is a list, and should be a number"),
    ],
)
def test_a_wrong_event_is_named(line: str, fault: str, tmp_path: Path) -> None:
    """A step that is text makes the resumed run compare it with a number; a report would draw a list."""
    path = tmp_path / "events.jsonl"
    path.write_text(f'{{"kind": "train", "step": 1, "loss": 1}}\n{line}\n{{"kind": "tr')
    with pytest.raises(cg.errors.CheckpointError) as caught:
        read_events(path)
    assert str(caught.value).startswith(f"{path}, line 2: {fault}")
    assert str(caught.value).endswith("; delete that line")
    path.write_text('{"kind": "train", "step": 1, "loss": 1}\n{"kind": "tr')
    assert [event["loss"] for event in read_events(path)] == [1]


@pytest.mark.parametrize(
    ("where", "value", "fault"),
    [
        (("settings",), [], "settings is a list, and should be an object"),
        (("result",), None, "result is None, and should be an object"),
        (("result", "cell", "kind"), "x", "result.cell.kind is 'x', and should be 'base', 'lora' or 'full'"),
        (("result", "cell", "r"), "4", "result.cell.r is '4', and should be a whole number"),
        (("result", "metrics", "acc1"), "high", "result.metrics.acc1 is 'high', and should be a number"),
        (("result", "bytes"), float("inf"), "result.bytes is inf"),
    ],
)
def test_a_wrong_cell_is_named(where: tuple[str, ...], value: Any, fault: str, tmp_path: Path) -> None:
    """A cell of another sweep, or one cut short, stopped the table with a traceback."""
    write_finished(tmp_path, CellResult(Cell("lora", "text-attention", 4), {"acc1": 0.5}), SETTINGS)
    assert read_cell(tmp_path, SETTINGS) is not None
    record = json.loads((tmp_path / "cell.json").read_text())
    owner = record
    for key in where[:-1]:
        owner = owner[key]
    owner[where[-1]] = value
    (tmp_path / "cell.json").write_text(json.dumps(record))
    with pytest.raises(cg.errors.CheckpointError) as caught:
        read_cell(tmp_path, SETTINGS)
    assert str(caught.value).startswith(f"{tmp_path / 'cell.json'}: {fault}")
    assert str(caught.value).endswith("; remove it to run the cell again")
