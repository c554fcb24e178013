"""Publishing an adapter: what is uploaded, what its card says, and that everybody can load it from there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clipgraft.errors import AdapterError, ConfigError
from clipgraft.report.args import PushArgs
from clipgraft.report.publish import stage
from clipgraft.train.sweep import read_cell
from hub_uploads import UploadHub
from tiny_pictures import write_pictures

# huggingface_hub reads its endpoint when it is imported.
CLI = "import sys; from clipgraft.cli import main; sys.exit(main(sys.argv[1:]))"
REPOSITORY = "someone/shoes"


@dataclass(frozen=True)
class Site:
    """A hub with the tiny base `owner/tiny`, and a run on it that was pushed as it ended."""

    hub: UploadHub
    root: Path
    run: Path
    told: str

    @property
    def published(self) -> Path:
        return self.hub.root / REPOSITORY

    def execute(self, code: str, *words: str, token: str = "write") -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        env = {**kept, "HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.root / "cache"), "HF_TOKEN": token}
        env |= {"HF_HUB_DISABLE_XET": "1", "CLIPGRAFT_CACHE": str(self.root / "features")}
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, *words],
            env=env,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=240,
        )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, hf_folder: Path) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("push")
    (root / "hub" / "owner").mkdir(parents=True)
    (root / "hub" / "owner" / "tiny").symlink_to(hf_folder)
    hub = UploadHub(root / "hub")
    table = write_pictures(root / "pictures")
    made = Site(hub, root, root / "logs" / "run", "")
    words = f"""train --model hf:owner/tiny --train-data {table} --val-data {table} --use-lora --lora-r 2
        --lr 1e-2 --batch-size 8 --epochs 2 --workers 0 --precision fp32 --name run
        --push-to-hub {REPOSITORY}""".split()
    done = made.execute(CLI, *words)
    assert done.returncode == 0, done.stderr
    try:
        yield Site(hub, root, made.run, done.stdout + done.stderr)
    finally:
        hub.stop()


def test_a_run_is_published_as_it_ends(site: Site) -> None:
    """`--push-to-hub` uploads something else than the adapter, or names folders of this machine in it."""
    there = sorted(path.name for path in site.published.iterdir())
    assert there == ["README.md", "adapter_config.json", "adapter_model.safetensors", "clipgraft.json"]
    assert f"to {site.hub.url}/{REPOSITORY}" in site.told
    assert "the card names no licence" in site.told
    weights = (site.published / "adapter_model.safetensors").read_bytes()
    assert weights == (site.run / "adapter" / "adapter_model.safetensors").read_bytes()
    for name in there:
        assert str(site.root).encode() not in (site.published / name).read_bytes(), name
    config = json.loads((site.published / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/tiny"


def test_the_card_says_what_the_run_measured(site: Site) -> None:
    """The card's numbers are not those of the run, or the hub cannot read its metadata."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(site.published / "README.md")
    data = card.data.to_dict()
    results = json.loads((site.run / "results.json").read_text())
    kept = next(line for line in results["history"] if line["epoch"] == results["best_epoch"])
    recorded = {
        metric["type"]: metric["value"]
        for entry in data["model-index"]
        for r in entry["results"]
        for metric in r["metrics"]
    }
    assert recorded["image_to_text_R@1"] == pytest.approx(kept["image_to_text_R@1"], abs=1e-5)
    assert (data["base_model"], data["library_name"]) == ("owner/tiny", "peft")
    assert data["widget"][0]["candidate_labels"]
    row = next(line for line in card.text.splitlines() if line.startswith("| `text_to_image_R@1`"))
    base, ours = (100 * values["text_to_image_R@1"] for values in (results["base"], kept))
    assert row == f"| `text_to_image_R@1` | {base:.1f} | {ours:.1f} |"
    assert f"| trained weights | {results['trainable']:,} |" in card.text
    assert "| strength | gained, % | kept, % |" in card.text


def test_everything_that_the_card_advises_works(site: Site) -> None:
    """Whoever copies the card's lines gets an error, or other features than whoever trained it had."""
    card = (site.published / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.S)
    (command,) = re.findall(r"```\nclipgraft (merge .*?)\n```", card)
    code = blocks[0] + (
        "\nimport torch, sys\nids = clip.tokenize(['a red cat', 'two dogs'])\n"
        "with torch.no_grad():\n    ours = clip.encode_text(ids)\n"
    )
    code += blocks[1] + (
        "\nwith torch.no_grad():\n"
        "    theirs = model.base_model.model.get_text_features(input_ids=ids)\n"
        "theirs = getattr(theirs, 'pooler_output', theirs)\n"
        "base = cg.load('hf:owner/tiny')\n"
        "with torch.no_grad():\n    before = base.encode_text(ids)\n"
        "print((ours - theirs).abs().max().item(), (ours - before).abs().max().item())\n"
        "from clipgraft.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    done = site.execute(code, *command.split())
    assert done.returncode == 0, done.stderr
    differs, moved = map(float, done.stdout.split()[:2])
    assert differs < 1e-5 < 1e-3 < moved
    assert (site.root / "merged").exists()


def test_the_hubs_adapter_is_evaluated_by_its_name(site: Site) -> None:
    """`hf:OWNER/NAME` is refused as a path that is not there by a command that reads adapters."""
    table = site.root / "pictures" / "pairs.csv"
    words = f"eval --model hf:owner/tiny --adapter hf:{REPOSITORY} --val-data {table} --out measured.json"
    done = site.execute(CLI, *words.split(), "--precision", "fp32", "--workers", "0")
    assert done.returncode == 0, done.stderr
    results = json.loads((site.run / "results.json").read_text())
    kept = next(line for line in results["history"] if line["epoch"] == results["best_epoch"])
    measured = (site.root / "measured.json").read_text()
    assert f'"image_to_text_R@1": {kept["image_to_text_R@1"]}' in measured


def test_refusals(site: Site) -> None:
    """A wrong token, another's repository or a hub that is away ends in a traceback, or half an upload."""
    (site.hub.root / "someone" / "else").mkdir()
    (site.hub.root / "someone" / "else" / "model.bin").write_bytes(b"theirs")
    told = site.execute(CLI, "push", str(site.run), "someone/else")
    assert told.returncode == 2
    assert "someone/else holds model.bin, and no adapter of clipgraft: choose another name" in told.stderr
    assert "replace it with --overwrite" in told.stderr
    assert [path.name for path in (site.hub.root / "someone" / "else").iterdir()] == ["model.bin"]
    told = site.execute(CLI, "push", str(site.run), "someone/new", token="read")
    assert told.returncode == 1
    assert (
        "someone/new cannot be pushed: the hub does not let you (403): log in with `hf auth login`"
        in told.stderr
    )
    assert not (site.hub.root / "someone" / "new").exists()


def test_a_dry_run_uploads_nothing(site: Site) -> None:
    """`--dry-run` makes a repository, or does not show what would be in it."""
    before = len(site.hub.requests)
    told = site.execute(CLI, "push", str(site.run), "someone/dry", "--dry-run", "--license", "apache-2.0")
    assert told.returncode == 0, told.stderr
    assert "license: apache-2.0" in told.stdout
    assert "adapter_model.safetensors" in told.stdout
    assert not [line for line in site.hub.requests[before:] if line.startswith("POST")]


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    """A typo in the path, or a model of all weights, is uploaded as an adapter or ends in a traceback."""
    with pytest.raises(AdapterError, match="is not there; give the folder of a run, or of an adapter"):
        stage(tmp_path / "none", REPOSITORY, PushArgs(), tmp_path)
    with pytest.raises(ConfigError, match="write OWNER/NAME"):
        stage(tmp_path, "shoes", PushArgs(), tmp_path)


def test_all_weights_stand_beside_the_adapter(world: Any, tmp_path: Path) -> None:
    """`--full-run` shows numbers of another run, or takes an adapter for a run of all weights."""
    cells = {cell.name: cell for cell in (world.sweep / "cells").iterdir()}
    full = next(cell for name, cell in cells.items() if name.startswith("full"))
    lora = next(cell for name, cell in cells.items() if not name.startswith(("full", "base")))
    stage(lora, REPOSITORY, PushArgs(full_run=full), tmp_path)
    done = read_cell(full, {})
    assert done is not None
    measured = done.metrics["text_to_image_R@1"]
    card = (tmp_path / "README.md").read_text().splitlines()
    row = next(line for line in card if line.startswith("| `text_to_image_R@1`"))
    assert row.endswith(f" | {100 * measured:.1f} |")
    with pytest.raises(ConfigError, match="is no run that fine-tuned all weights"):
        stage(lora, REPOSITORY, PushArgs(full_run=lora), tmp_path)
