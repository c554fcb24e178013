"""The tables of what every conversion costs, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.conversions.__main__ import all_rows, differences_table, main
from benchmarks.conversions.refused import attempts
from benchmarks.conversions.world import FAMILIES, Outcome, Row, World, adapted, differences, make_world

pytestmark = [
    # PEFT 0.21 reads an attribute that transformers 5.23 is about to rename.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    # What the row itself is about.
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers"),
]
FIRST_OF_GROUP = {row.group: row for row in reversed(all_rows())}
EXACT = [row for group, row in FIRST_OF_GROUP.items() if "bf16" not in group]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), tiny=True)


@pytest.mark.parametrize("row", EXACT, ids=lambda row: row.group)
def test_conversions_change_nothing_but_roundings(row: Row, world: World) -> None:
    """The published table has a row of another order of magnitude, or one whose adapter does nothing."""
    found = row.run(world)
    assert found.share <= 1e-5
    assert found.moved is None or found.moved > 0.01


def test_both_bases_are_one_and_a_lost_adapter_shows(world: World) -> None:
    """A row would report agreement although one end ran the base alone."""
    open_clip, transformers = (world.run(world.bases[family].model) for family in FAMILIES)
    assert differences(transformers, open_clip)[1] <= 1e-5
    wanted = world.run(adapted(world, "open_clip", targets="attention").model)
    lost = world.compare(world.untouched, wanted)
    assert lost.share == lost.moved
    assert lost.share > 0.01


def test_a_share_is_of_its_own_tower() -> None:
    """An error in the tower with the smaller features hides behind the larger ones of the other."""
    wanted = torch.tensor([[100.0, 1.0]]), torch.tensor([[0.5, -2.0]])
    got = wanted[0], wanted[1] + torch.tensor([[0.0, 1.0]])
    assert differences(got, wanted) == (1.0, 0.5)


def test_rows_have_names_of_their_own_and_large_shares_stand_out() -> None:
    """Two rows cannot be told apart, or a failure looks like the others."""
    rows = all_rows()
    assert len({(row.group, row.name) for row in rows}) == len(rows)
    table = differences_table({rows[0]: Outcome(2e-3, 1.5e-3, 0.7), rows[1]: Outcome(0.0, 0.0)})
    assert table.rows[0][1:] == ("2.0e-03", "**1.5e-03**", "0.70", "")
    assert table.rows[1][1:] == ("0", "0", "", "")
    assert rows[0].group in table.rows[0][0]
    assert rows[0].group not in table.rows[1][0]


def test_what_peft_does_not_take_over(world: World) -> None:
    """The page says that PEFT refuses what it has learnt to load meanwhile."""
    told = {what: attempt(world) for what, attempt in attempts().items()}
    assert not [what for what, outcome in told.items() if outcome == "loads"]
    assert "logit_scale stays" in told["a trained temperature (`train_logit_scale`)"]


def test_the_page_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints one thing and writes another, or measures more than it was asked to."""
    out = tmp_path / "page.md"
    assert main(["--tiny", "--only", "clipgraft -> guide", "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert text.strip() == capsys.readouterr().out.strip()
    wanted = [row for row in all_rows() if "clipgraft -> guide" in row.name]
    assert text.count("clipgraft -> guide") == len(wanted) > 0
