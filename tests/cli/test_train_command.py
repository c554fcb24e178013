"""`clipgraft train` from end to end, on tiny bases."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import clipgraft as cg
from clipgraft.cli.main import main
from clipgraft.cli.train import continuation
from clipgraft.models.load import load
from clipgraft.train.run_folder import RunFolder

# The guide's §5.2, word for word but for its paths.
GUIDE = """
python -m open_clip_train.main \\
    --train-data "${DATASET_PATH}/train.csv" \\
    --dataset-type "csv" \\
    --csv-img-key "image" \\
    --csv-caption-key "caption" \\
    --csv-separator "," \\
    --warmup 500 \\
    --batch-size 128 \\
    --lr 1e-4 \\
    --wd 0.1 \\
    --epochs 32 \\
    --workers 4 \\
    --model "ViT-B-32" \\
    --pretrained "laion2b_s34b_b79k" \\
    --logs "${LOG_DIR}" \\
    --name "test_lora_training" \\
    --save-frequency 5 \\
    --val-data "${DATASET_PATH}/val.csv" \\
    --val-frequency 1 \\
    --use-lora \\
    --lora-r 16 \\
    --lora-alpha 16 \\
    --lora-dropout 0.1 \\
    --lora-target-modules "in_proj,out_proj" \\
    --save-lora-only
"""


def metrics(run: Path) -> dict[str, float]:
    return dict(json.loads((run / "results.json").read_text())["history"][-1])


def test_the_guides_command(
    cli: Any, table: Path, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guide's readers replace `python -m open_clip_train.main` by `clipgraft train`, and nothing else."""
    data = tmp_path / "flickr8k_vi"
    data.mkdir()
    header, *rows = table.read_text(encoding="utf-8").splitlines()
    lines = [header, *(f"{table.parent}/{row}" for row in rows)]
    (data / "val.csv").write_text("\n".join(lines), encoding="utf-8")
    many = [f"{row} {number}" for number in range(6) for row in lines[1:]]
    (data / "train.csv").write_text("\n".join([header, *many]), encoding="utf-8")
    command = GUIDE.replace("python -m open_clip_train.main", "clipgraft train").replace("\\\n", " ")
    command = command.replace("${DATASET_PATH}", str(data)).replace("${LOG_DIR}", str(tmp_path / "logs"))
    # The only change: a base from this disk where the guide's would be downloaded.
    monkeypatch.setattr(
        "clipgraft.adapters.open.load", lambda name, tag, **options: load(str(tiny_config), "none", **options)
    )
    outcome = cli(*shlex.split(command)[1:])
    assert (outcome.code, outcome.err) == (0, "")
    run = tmp_path / "logs" / "test_lora_training"
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {"best.pt", "latest.pt", *(f"epoch_{number}" for number in (5, 10, 15, 20, 25, 30, 32))}
    adapter = cg.read_adapter(run)
    assert (adapter.settings.r, adapter.settings.alpha, adapter.settings.dropout) == (16, 16, 0.1)
    assert {str(site) for site in adapter.weights} == {
        f"text.{b}.{role}" for b in (0, 1) for role in ("q", "k", "v", "out")
    }


def test_what_is_told_and_kept(train: Any, table: Path, tmp_path: Path) -> None:
    """A user must see what was read, what trains, how it goes, and where the result is."""
    outcome = train(
        "--use-lora", "--lora-targets", "text-attention", "--lora-r", 2, "--name", "thử", "--val-data", table
    )
    run = tmp_path / "logs" / "thử"
    assert (outcome.code, outcome.err) == (0, "")
    for part in (
        "fingerprint",
        "images                   12",
        "LoRA r=2 on 8 sites (text-attention)",
        "24 pairs, batches of 8, 1 epoch",
        "the image tower is frozen",
        "epoch 1 of 1: mean loss",
        "epoch 1: image_to_text_R@1",
        f"saved {run / 'adapter'}",
    ):
        assert part in outcome.out
        assert part in (run / "out.log").read_text(encoding="utf-8"), "out.log holds what was printed"
    params = (run / "params.txt").read_text(encoding="utf-8")
    assert f"train_data: {table}\n" in params
    assert "lora_r: 2\n" in params


def test_full_fine_tuning_is_the_same_command_without_lora(
    train: Any, table: Path, tmp_path: Path, tiny_config: Path
) -> None:
    """The comparison with full fine-tuning needs no other tool."""
    assert train("--name", "full", "--lr", "1e-3").code == 0
    model = load(str(tiny_config), str(tmp_path / "logs/full/checkpoints/epoch_1.pt")).model
    assert not torch.equal(
        model.visual.conv1.weight, load(str(tiny_config), "none").model.visual.conv1.weight
    )


def test_an_adapter_run_keeps_adapters_alone(train: Any, tmp_path: Path) -> None:
    """An adapter of 0.4 MB fills the disk with a copy of its base each epoch; or the copy cannot be had."""
    lora = ("--use-lora", "--lora-r", 2)
    assert train(*lora, "--name", "small").code == 0
    assert train(*lora, "--name", "whole", "--no-save-lora-only").code == 0
    kept = {
        name: {path.name for path in (tmp_path / "logs" / name / "checkpoints").iterdir()}
        for name in ("small", "whole")
    }
    assert kept == {"small": {"epoch_1", "latest.pt"}, "whole": {"epoch_1", "epoch_1.pt", "latest.pt"}}
    trained = [*torch.load(tmp_path / "logs/small/checkpoints/latest.pt", weights_only=True)["weights"]]
    assert trained
    assert all("lora_" in name for name in trained), "the checkpoint holds weights that do not train"


def test_more_epochs_for_a_run_that_is_done(train: Any, tmp_path: Path) -> None:
    """A run that was too short must be trained again from its first step."""
    words = ("--use-lora", "--lora-r", 2, "--name", "run")
    assert train(*words).code == 0
    again = train(*words, "--resume", "latest", "--epochs", 3)
    assert (again.code, again.err) == (0, "")
    run = tmp_path / "logs" / "run"
    assert (
        f"{run} was to have 1 epoch: 2 more follow, for which the learning rate starts at what was found"
        in again.out
    )
    params = json.loads((run / "params.json").read_text())
    assert (params["epochs"], params["epoch_parts"]) == (3, [1, 2])
    fewer = train(*words, "--resume", "latest", "--epochs", 2)
    assert (fewer.code, fewer.err.count("\n")) == (2, 1)
    assert "has done 3 epochs already" in fewer.err


def test_a_resume_that_does_not_fit_is_told_first(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that do not fit a checkpoint are found after all images have been opened."""
    words = ("--use-lora", "--lora-r", 2, "--name", "run")
    assert train(*words).code == 0
    monkeypatch.setattr("clipgraft.adapters.open.load", lambda *_, **__: pytest.fail("the model was loaded"))
    outcome = train("--use-lora", "--lora-r", 4, "--name", "run", "--resume", "latest", "--lr", "0.3")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "--lr (was 'auto', now 0.3), --lora-r (was 2, now 4)" in outcome.err


def test_a_run_names_itself(train: Any, tmp_path: Path) -> None:
    """Without --name, two runs must not meet in one folder."""
    assert train("--use-lora", "--lora-r", 2, "--lr", "1e-3").code == 0
    (run,) = (tmp_path / "logs").iterdir()
    assert run.name.endswith("-tiny-clip-lora_r2-lr_0.001-b_8")


def test_a_transformers_folder_as_base(cli: Any, table: Path, hf_folder: Path, tmp_path: Path) -> None:
    """Users of transformers have a folder, not an open_clip name."""
    words = [
        "train",
        "--model",
        hf_folder,
        "--train-data",
        table,
        "--use-lora",
        "--epochs",
        1,
        "--batch-size",
        8,
    ]
    assert cli(*words, "--workers", 0, "--logs", tmp_path, "--name", "hf").code == 0
    again = cg.load(str(tmp_path / "hf"))
    assert again.source.name == str(hf_folder)
    assert cg.count_parameters(again).lora > 0


def test_config_file_with_flags_over_it(train: Any, table: Path, tmp_path: Path) -> None:
    """A run is repeated from its file with one thing changed."""
    (tmp_path / "run.yaml").write_text("use_lora: true\nlora-r: 8\nname: from-file\nlr: 1e-3\n")
    assert train("--config", tmp_path / "run.yaml", "--lora-r", 4).code == 0
    assert cg.read_adapter(tmp_path / "logs" / "from-file").settings.r == 4


def test_training_an_adapter_further(train: Any, cli: Any, table: Path, tmp_path: Path) -> None:
    """`--model ADAPTER` goes on from a finished adapter; with --use-lora it would be two adapters."""
    assert train("--use-lora", "--lora-r", 2, "--name", "first").code == 0
    first = tmp_path / "logs" / "first"
    words = [
        "train",
        "--train-data",
        table,
        "--logs",
        tmp_path,
        "--batch-size",
        8,
        "--epochs",
        1,
        "--workers",
        0,
    ]
    assert cli(*words, "--model", first, "--name", "second").code == 0
    adapters = [cg.read_adapter(run) for run in (first, tmp_path / "second")]
    assert adapters[0].fingerprint == adapters[1].fingerprint
    refused = cli(*words, "--model", first, "--name", "third", "--use-lora")
    assert refused.code == 2
    assert "is an adapter on its base; drop --use-lora" in refused.err


def test_faults_between_flags_come_together_and_before_the_model(
    cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong path should not be found after the model was downloaded."""
    monkeypatch.setattr("clipgraft.adapters.open.load", lambda *_, **__: pytest.fail("the model was loaded"))
    words = "train --train-data nowhere.csv --val-data none.csv --lora-r 4 --lora-alpha 8 --save-lora-only"
    words += " --lora-targets text.*.q --lora-target-modules in_proj --lock-image-unlocked-groups 2"
    outcome = cli(*words.split(), "--resume", "latest")
    assert (outcome.code, outcome.out) == (2, "")
    assert [
        line.removeprefix("clipgraft: ").split(" given")[0].split(":")[0] for line in outcome.err.splitlines()
    ] == [
        "--train-data nowhere.csv",
        "--val-data none.csv",
        "--lora-alpha, --lora-r, --lora-target-modules, --lora-targets",
        "--lora-targets and --lora-target-modules both choose sites",
        "--save-lora-only",
        "--lock-image-unlocked-groups",
        "--resume latest needs --name",
    ]


def test_missing_data_is_named(cli: Any) -> None:
    """The one flag without a default."""
    outcome = cli("train", "--use-lora")
    assert (outcome.code, outcome.err) == (
        2,
        "clipgraft: --train-data is missing: a table of images and captions, or a folder of both\n",
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--use-lora", "--lora-target-modules", "q_proj"],
            "--lora-target-modules: 'q_proj' is unknown; allowed are",
        ),
        (["--use-lora", "--lora-targets", "txt-attention"], "near misses: text-attention"),
        (["--device", "gpu"], "--device: got 'gpu', allowed is auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99: torch sees"),
        (["--use-lora", "--batch-size", "100"], "24 captions do not fill one batch of --batch-size 100"),
        (
            ["--use-lora", "--lock-text-unlocked-layers", "1"],
            "--lock-text-unlocked-layers given with --use-lora",
        ),
        (["--lock-image", "--lock-text"], "nothing to train: both towers are frozen"),
        (["--lr-scheduler", "const-cooldown"], "const-cooldown needs --epochs-cooldown from 1 to 1"),
        (["--use-lora", "--cache-views", "2"], "--cache-views given without --augment: add --augment"),
        (["--csv-img-key", "picture"], "picture"),
        (["--precision", "fp16"], "--precision: got 'fp16'"),
        (
            ["--lr", "1e-3", "--retain-weight", "3"],
            "--retain-weight given without --retain: say what to retain, or drop it",
        ),
        (["--retain", "nowhere.txt"], "--retain nowhere.txt: there is no such file or folder"),
        (
            ["--retain", "auto", "--retain-weight", "0"],
            "--retain-weight: got '0', allowed is a number above 0",
        ),
        (["--loss", "sigmoid"], "--loss sigmoid: this base has no `logit_bias`"),
        (
            ["--loss", "sigmoid", "--task", "classification", "--csv-label-key", "caption"],
            "--loss sigmoid is for pairs: classes exclude each other",
        ),
        (["--loss", "hinge"], "--loss: got 'hinge', allowed is one of 'auto', 'softmax' or 'sigmoid'"),
        (["--patience", "2"], "--patience needs validation data, by which the best epoch is known"),
    ],
)
def test_bad_input_is_one_line_and_code_2(words: list[str], told: str, train: Any) -> None:
    """Whatever is wrong with the flags, the user reads one line and a script sees 2."""
    outcome = train(*words)
    assert outcome.code == 2
    assert told in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_siglip_config_is_trained_by_its_own_loss(
    cli: Any, table: Path, tiny_config: Path, tmp_path: Path
) -> None:
    """`--loss auto` would take a SigLIP for a CLIP, or a run could only go on where the loss is named."""
    config = {**json.loads(tiny_config.read_text()), "init_logit_bias": -10.0}
    place = tmp_path / "tiny-siglip.json"
    place.write_text(json.dumps(config), encoding="utf-8")
    words = ["train", "--train-data", table, "--model", place, "--pretrained", "none", "--precision", "fp32"]
    words += ["--use-lora", "--lora-train-logit-scale", "--batch-size", "8", "--lr", "1e-3", "--workers", "0"]
    words += ["--feature-cache", "none", "--logs", tmp_path, "--name", "run"]
    outcome = cli(*words, "--epochs", "1")
    assert outcome.code == 0, outcome.err
    assert "sigmoid, as the base has a logit_bias (--loss softmax is the other)" in outcome.out + outcome.err
    params = json.loads((tmp_path / "run" / "params.json").read_text())
    assert params["loss"] == "sigmoid"
    again = cli(*words, "--epoch-parts", "1,1", "--resume", "latest")
    assert again.code == 0, again.err
    other = cli(*words, "--epoch-parts", "1,1,1", "--resume", "latest", "--loss", "softmax")
    assert other.code == 2
    assert "--loss (was 'sigmoid', now 'softmax')" in other.err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            "a dog\na cat\na dog\n",
            "2 different texts are too few to hold a model to; give 20 or more, or --retain auto",
        ),
        ("", "holds no text"),
    ],
)
def test_too_little_to_retain_is_told_before_the_model(
    content: str, told: str, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run would begin, and hold its model to nothing much."""
    monkeypatch.setattr("clipgraft.adapters.open.load", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "few.txt").write_text(content)
    outcome = train("--use-lora", "--retain", tmp_path / "few.txt")
    assert outcome.code == 2
    assert "few.txt" in outcome.err
    assert told in outcome.err
    assert outcome.err.count("\n") == 1


def test_retained_texts_and_the_strength_that_is_saved(train: Any, table: Path, tmp_path: Path) -> None:
    """The flags would change nothing, or what is told would be another adapter than the one that is saved."""
    texts = tmp_path / "old.txt"
    texts.write_text("".join(f"an old word number {number}\n" for number in range(40)))
    words = ["--use-lora", "--val-data", table, "--retain", texts, "--strength", "auto", "--name", "kept"]
    outcome = train(*words, "--lr", "1e-2", "--epochs", "2")
    assert outcome.code == 0, outcome.err
    run = tmp_path / "logs" / "kept"
    results = json.loads((run / "results.json").read_text())
    curve, told = results["strength"], outcome.out + outcome.err
    assert curve["applied"]
    assert f"saved with strength {curve['recommended']:g}" in told
    assert "held to the base on 32 texts" in told
    assert "--retain-weight auto takes 30, untried" in told
    assert curve["texts"] == 8
    alpha = json.loads((run / "adapter" / "adapter_config.json").read_text())["lora_alpha"]
    assert alpha == pytest.approx(16 * curve["recommended"])
    params = json.loads((run / "params.json").read_text())
    assert (params["retain"], params["strength"]) == (str(texts), "auto")


def test_pictures_beside_retained_texts_hold_an_image_tower(train: Any, table: Path) -> None:
    """Pictures of old data would count for nothing, or be opened in vain for a tower that does not change."""
    words = ["--use-lora", "--retain", table, "--epochs", "1"]
    of_images = train(*words, "--lora-targets", "vision-attention", "--name", "images")
    assert of_images.code == 0, of_images.err
    of_texts = train(*words, "--name", "texts")
    assert re.search(r"held to the base on \d+ texts and \d+ pictures: ", of_images.out)
    assert re.search(r"held to the base on \d+ texts: ", of_texts.out)


def test_a_run_whose_rate_is_given_is_not_held_to_its_base(train: Any) -> None:
    """The guide's command would train on more than it says, or a newcomer's run forget what it need not."""
    held = "held to the base on"
    assert held in train("--use-lora", "--name", "open").out
    assert held not in train("--use-lora", "--lr", "1e-3", "--name", "given").out
    assert held not in train("--use-lora", "--retain", "none", "--name", "none").out
    assert held in train("--use-lora", "--lr", "1e-3", "--retain", "auto", "--name", "asked").out


def test_divergence_is_code_1(train: Any) -> None:
    """A failure of training is not bad input: a scheduler may try again with other settings."""
    outcome = train("--use-lora", "--lora-targets", "linear", "--lr", "1e30")
    assert outcome.code == 1
    assert outcome.err.startswith(
        "clipgraft: the loss is nan at step 2: likely the learning rate (7.5e+29) is too high"
    )


def test_a_used_name_is_refused_at_once(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a finished run must not cost a model load to be refused, nor be overwritten."""
    assert train("--use-lora", "--name", "run").code == 0
    monkeypatch.setattr("clipgraft.adapters.open.load", lambda *_, **__: pytest.fail("the model was loaded"))
    outcome = train("--use-lora", "--name", "run")
    assert outcome.code == 2
    assert "exists already: add --resume latest to continue it, or choose another --name" in outcome.err


@pytest.mark.parametrize("named", [True, False])
def test_ctrl_c_says_the_command_that_goes_on(
    named: bool,
    train: Any,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The printed command, pasted as it stands, must finish the run with the bits of an uninterrupted one."""
    flags = ["--use-lora", "--lora-r", 2, "--epochs", 2, "--val-data", table]
    assert train(*flags, "--name", "whole").code == 0
    with monkeypatch.context() as patch:
        report = RunFolder.event

        def event(self: RunFolder, kind: str, step: int, values: Any) -> None:
            report(self, kind, step, values)
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(RunFolder, "event", event)
        stopped = train(*flags, *(["--name", "my run"] if named else []))
    assert stopped.code == 130
    (line,) = stopped.err.splitlines()
    told, command = line.split("; go on with: ")
    assert told == "clipgraft: stopped and saved after step 2 of 6"
    program, *words = shlex.split(command)
    assert program == "clipgraft"
    assert main(words) == 0
    (run,) = [path for path in (tmp_path / "logs").iterdir() if path.name != "whole"]
    wanted = tmp_path / "logs" / "whole"
    for file in ("adapter_model.safetensors", "adapter_config.json", "clipgraft.json"):
        assert (run / "adapter" / file).read_bytes() == (wanted / "adapter" / file).read_bytes()
    assert "resuming after step 2 of 6" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SIGINT", "SIGTERM"])
def test_a_signal_to_all_processes_of_the_run(
    kind: str, base: list[str], table: Path, tmp_path: Path
) -> None:
    """A terminal and job schedulers signal the workers too: that must make no noise, and lose nothing."""
    script = (
        "import os, signal, sys\nfrom clipgraft.cli import main\n"
        "from clipgraft.train.run_folder import RunFolder\n"
        "report = RunFolder.event\n"
        "def event(self, name, step, values):\n"
        "    report(self, name, step, values)\n"
        f"    if step == 4: os.killpg(0, signal.{kind})\n"
        "RunFolder.event = event\nsys.exit(main(sys.argv[1:]))\n"
    )
    flags = [
        "--train-data",
        str(table),
        "--logs",
        str(tmp_path),
        "--name",
        "run",
        "--batch-size",
        "4",
        "--epochs",
        "50",
    ]
    more = ["--use-lora", "--lora-targets", "vision-attention", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-c", script, "train", *base, *flags, *more],
        start_new_session=True,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    notice, told = done.stderr.strip().splitlines()
    assert done.returncode == {"SIGINT": 130, "SIGTERM": 143}[kind]
    assert notice == "stopping after this step, then saving; once more stops at once, without saving"
    assert told.startswith("clipgraft: stopped and saved after step 4 of 300; go on with: clipgraft train")


def test_continuation_keeps_what_was_given() -> None:
    """A name or --resume that is given twice would confuse whoever reads the command."""
    words = ["--name=vi run", "--resume", "latest", "--logs", "a b"]
    assert shlex.split(continuation(words, "other")) == ["clipgraft", "train", *words]
    assert shlex.split(continuation([], "a b")) == [
        "clipgraft",
        "train",
        "--name",
        "a b",
        "--resume",
        "latest",
    ]


def test_bf16_full_fine_tuning_is_warned_of(train: Any) -> None:
    """Weights kept in bf16 lose small updates: the run would look fine and learn little."""
    assert "--precision bf16 rounds small updates of the model away" in train("--precision", "bf16").out


def test_the_seed_decides_everything(train: Any, tmp_path: Path) -> None:
    """Two runs with one seed must be the same, and with two seeds different."""
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train("--use-lora", "--name", name, "--seed", seed).code == 0
        found.append((tmp_path / "logs" / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_image_lora_with_workers_and_crops(train: Any, tmp_path: Path) -> None:
    """Workers load and crop the pictures; the result must not depend on their number."""
    found = []
    for workers in (0, 2):
        flags = ["--use-lora", "--lora-targets", "vision-attention", "--augment", "--workers", workers]
        assert train(*flags, "--name", workers, "--accum-freq", 2, "--batch-size", 4).code == 0
        found.append(
            (tmp_path / "logs" / str(workers) / "adapter" / "adapter_model.safetensors").read_bytes()
        )
    assert found[0] == found[1]


def test_the_model_is_what_open_clip_builds(base: list[str], tiny_config: Path) -> None:
    """`--pretrained none` must be the same weights in every run, or no adapter would fit."""
    models: list[nn.Module] = [load(str(tiny_config), "none").model for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_lora_options_reach_the_adapter(train: Any, table: Path, tmp_path: Path) -> None:
    """A flag of the adapter is accepted and ignored."""
    outcome = train(
        *("--use-lora", "--lora-r", "auto", "--lora-dora", "--lora-bias", "lora_only", "--lora-init", "eva"),
        *("--lora-plus-ratio", 4, "--lora-targets", "text-attention", "--name", "all"),
    )
    assert (outcome.code, outcome.err) == (0, "")
    assert "--lora-r auto: r=8 for retrieval with 24 pairs (fewer than 10,000)" in outcome.out
    assert "DoRA r=8 on 8 sites (text-attention)" in outcome.out
    assert "LoRA starts on the principal directions of 24 pairs at 8 sites" in outcome.out
    adapter = cg.read_adapter(tmp_path / "logs" / "all")
    assert (adapter.settings.r, adapter.settings.use_dora, adapter.settings.bias) == (8, True, "lora_only")
    assert len([p for p in adapter.parts.values() if "lora_magnitude" in p]) == len(adapter.biases) == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--use-lora", "--lora-r", "0"], "--lora-r: got '0', allowed is a whole number from 1 up"),
        (
            ["--use-lora", "--lora-r", "big"],
            "--lora-r: got 'big', allowed is a whole number from 1 up, or auto",
        ),
        (["--use-lora", "--lora-bias", "yes"], "--lora-bias: got 'yes', allowed is one of"),
        (["--lora-plus-ratio", "4"], "--lora-plus-ratio given without --use-lora"),
    ],
)
def test_wrong_lora_options(train: Any, words: list[str], message: str) -> None:
    """A mistyped option ends in a traceback, or in a run that does something else."""
    outcome = train(*words)
    assert outcome.code == 2
    assert message in outcome.err
