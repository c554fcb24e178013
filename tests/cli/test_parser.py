"""Flags: every one of open_clip's and the guide's, checked all at once, with --config beside them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

import clipgraft as cg
from clipgraft.cli.flags.groups import AnyGroup, flag, grouped, recorded
from clipgraft.cli.flags.shared import DataFlags, ModelFlags
from clipgraft.cli.flags.training import RUN, LoraFlags, RunFlags
from clipgraft.cli.main import VERBS, function_of, main
from clipgraft.cli.parser import EXAMPLES, parse
from clipgraft.train.args import TrainArgs

KINDS: list[AnyGroup] = [ModelFlags, DataFlags, LoraFlags, TrainArgs, RUN, RunFlags]


def values(*words: str) -> dict[str, Any]:
    """Every field of `clipgraft train WORDS…`."""
    return recorded(KINDS, parse("train", "", KINDS, words))


def faults(*words: str) -> list[str]:
    with pytest.raises(cg.errors.ConfigError) as caught:
        values(*words)
    return str(caught.value).splitlines()


FLAGS: dict[str, tuple[str, Any]] = {
    "--train-data": ("a.csv", Path("a.csv")),
    "--val-data": ("b.csv", Path("b.csv")),
    "--dataset-type": ("csv", "csv"),
    "--csv-img-key": ("image", "image"),
    "--csv-caption-key": ("caption", "caption"),
    "--csv-separator": ("\\t", "\t"),
    "--model": ("ViT-B-32", "ViT-B-32"),
    "--pretrained": ("laion2b_s34b_b79k", "laion2b_s34b_b79k"),
    "--batch-size": ("128", 128),
    "--epochs": ("32", 32),
    "--lr": ("1e-4", 1e-4),
    "--wd": ("0.1", 0.1),
    "--beta1": ("0.8", 0.8),
    "--beta2": ("0.95", 0.95),
    "--eps": ("1e-8", 1e-8),
    "--warmup": ("500", 500),
    "--workers": ("4", 4),
    "--precision": ("amp_bf16", "amp_bf16"),
    "--val-frequency": ("1", 1),
    "--save-frequency": ("5", 5),
    "--resume": ("latest", "latest"),
    "--logs": ("logs", Path("logs")),
    "--name": ("run", "run"),
    "--seed": ("7", 7),
    "--grad-clip-norm": ("1", 1.0),
    "--accum-freq": ("4", 4),
    "--lr-scheduler": ("const-cooldown", "const-cooldown"),
    "--epochs-cooldown": ("2", 2),
    "--lr-cooldown-end": ("1e-6", 1e-6),
    "--lr-cooldown-power": ("2", 2.0),
    "--lock-image-unlocked-groups": ("2", 2),
    "--lock-text-unlocked-layers": ("3", 3),
    "--cache-views": ("4", 4),
    "--feature-cache": ("none", None),
    "--cache-gb": ("0.5", 0.5),
    "--lora-r": ("8", 8),
    "--lora-alpha": ("16", 16.0),
    "--lora-dropout": ("0.1", 0.1),
    "--lora-target-modules": ("in_proj, out_proj", ("in_proj", "out_proj")),
    "--lora-targets": ("text.*.q,v", "text.*.q,v"),
    "--lora-rank-pattern": ("text.0.*=4,text.11.*=32", {"text.0.*": 4, "text.11.*": 32}),
    "--lora-alpha-pattern": ("text.0.*=0.5", {"text.0.*": 0.5}),
}
SWITCHES = (
    "--grad-checkpointing",
    "--lock-image",
    "--lock-text",
    "--use-lora",
    "--save-lora-only",
    "--augment",
    "--exact-preprocess",
)


@pytest.mark.parametrize("form", ["apart", "joined"])
@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_open_clip_and_the_guide(flag: str, form: str) -> None:
    """A command copied from open_clip or the guide would stop at a flag."""
    text, value = FLAGS[flag]
    words = [flag, text] if form == "apart" else [f"{flag}={text}"]
    assert values(*words)[flag.removeprefix("--").replace("-", "_")] == value


@pytest.mark.parametrize("flag", SWITCHES)
def test_switches_switch(flag: str) -> None:
    """A switch that needs a value, or that YAML turned on and a flag cannot turn off."""
    name = flag.removeprefix("--").replace("-", "_")
    assert values()[name] is (flag == "--save-lora-only")
    assert values(flag)[name] is True
    assert values(flag, flag.replace("--", "--no-"))[name] is False


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("auto", None),
        ("fp32", False),
        ("bf16", False),
        ("amp", True),
        ("amp_bfloat16", True),
        ("amp_bf16", True),
    ],
)
def test_precision_in_open_clips_words(given: str, wanted: bool | None) -> None:
    """A command copied from open_clip would stop at its `--precision amp`."""
    (spec,) = parse("eval", "", [ModelFlags], ["--precision", given])
    assert spec.autocast is wanted
    assert spec.precision == ("amp_bf16" if wanted else given)


def test_what_is_not_given_suits_tuning() -> None:
    """A newcomer would train with settings for training from scratch, or others than are documented."""
    found = values()
    wanted = {
        "lr": "auto",
        "wd": 0.1,
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": 1e-6,
        "warmup": 500,
        "batch_size": 64,
    }
    wanted |= {"epochs": "auto", "lr_scheduler": "cosine", "seed": 0, "save_frequency": 1, "val_frequency": 1}
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lr", "fast"], "--lr: got 'fast', allowed is a number"),
        (["--lr", "-1"], "--lr: got '-1', allowed is greater than 0"),
        (["--lr", "nan"], "--lr: got 'nan', allowed is a finite number"),
        (["--lr=inf"], "--lr: got 'inf', allowed is a finite number"),
        (["--batch-size", "1"], "--batch-size: got '1', allowed is greater than or equal to 2"),
        (["--epochs", "1.5"], "--epochs: got '1.5', allowed is a whole number"),
        (
            ["--precision", "fp16"],
            "--precision: got 'fp16', allowed is one of 'auto', 'fp32', 'amp_bf16' or 'bf16'",
        ),
        (["--resume", "epoch_3.pt"], "--resume: got 'epoch_3.pt', allowed is one of 'latest'"),
        (["--lora-dropout", "1"], "--lora-dropout: got '1', allowed is a number from 0 to 0.99"),
        (
            ["--lora-rank-pattern", "text.0.*"],
            "--lora-rank-pattern: got 'text.0.*', allowed is write SITES=NUMBER",
        ),
        (
            ["--lora-rank-pattern", "a=0"],
            "--lora-rank-pattern: got '0' at 'a', allowed is greater than or equal to 1",
        ),
        (["--train-data", ""], "--train-data: got '', allowed is a path"),
        (["--name="], "--name: got '', allowed is text with at least 1 character"),
        (["--seed", str(2**63)], f"--seed: got '{2**63}', allowed is less than {2**63}"),
    ],
)
def test_wrong_values_name_flag_value_and_what_is_allowed(words: list[str], told: str) -> None:
    """A user should see which flag, what it got, and what it takes."""
    (line,) = faults(*words)
    assert line.startswith(told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--batchsize", "64"], "--batchsize: there is no such flag (did you mean --batch-size?)"),
        (["--batch_size=64"], "--batch_size: there is no such flag (did you mean --batch-size?)"),
        (["-lr", "1e-4"], "-lr: there is no such flag (did you mean --lr"),
        (["--Lora-R", "4"], "--Lora-R: there is no such flag (did you mean --lora-r?)"),
        (["--lora", "4"], "--lora: there is no such flag (did you mean --"),
        (["--zzz"], "--zzz: there is no such flag"),
    ],
)
def test_typos_name_the_nearest_flag(words: list[str], told: str) -> None:
    """A typo that is ignored trains with the default instead."""
    (line,) = faults(*words)
    assert line.startswith(told)


def test_all_faults_are_told_at_once() -> None:
    """One fault a run means as many runs as typos."""
    told = faults("--lr", "x", "--batchsize", "8", "--epochs", "0", "--learning-rate", "-1", "--wd", "-1")
    assert [line.split(":")[0] for line in told] == [
        "--batchsize",
        "--learning-rate",
        "--epochs",
        "--lr",
        "--wd",
    ]


@pytest.mark.parametrize("words", [["--lr"], ["--lora-r", "--use-lora"], ["stray"]])
def test_bad_syntax_points_to_help(words: list[str]) -> None:
    """A forgotten value must not swallow the next flag."""
    (line,) = faults(*words)
    assert "`clipgraft train --help` lists the flags" in line


def test_abbreviations_are_no_flags() -> None:
    """`--lora` that means whichever flag comes first would change meaning with the next release."""
    assert faults("--epoch", "3") == [
        "--epoch: there is no such flag (did you mean --epochs or --epoch-parts?)"
    ]


def config(folder: Path, text: str) -> str:
    path = folder / "chạy.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_config_file_in_either_spelling_and_flags_win(tmp_path: Path) -> None:
    """A run is kept in a file and varied by flags."""
    path = config(
        tmp_path,
        "lr: 1e-3\nbatch-size: 32\n--epochs: 4\nuse_lora: true\nlora_target_modules: [in_proj, out_proj]\n"
        "lora_rank_pattern: {text.0.*: 4}\nname: 2024\ncsv_separator: ','\nval_data: null\n",
    )
    found = values("--batch-size", "16", "--config", path, "--no-use-lora")
    assert (found["lr"], found["batch_size"], found["epochs"], found["use_lora"]) == (1e-3, 16, 4, False)
    assert found["lora_target_modules"] == ("in_proj", "out_proj")
    assert found["lora_rank_pattern"] == {"text.0.*": 4}
    assert (found["name"], found["csv_separator"], found["val_data"]) == ("2024", ",", None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- lr", "write one 'flag: value' a line"),
        ("lr: [", "is not YAML"),
        ("lr: fast", "--lr: got 'fast'"),
        ("batchsize: 3", "--batchsize: there is no such flag (did you mean --batch-size?)"),
        ("train: {lr: 1}", "--train: there is no such flag"),
        ("lora_r: null", "--lora-r: got None"),
    ],
)
def test_faults_of_a_config_file(text: str, told: str, tmp_path: Path) -> None:
    """What is wrong in the file is told as what is wrong on the command line."""
    (line,) = faults("--config", config(tmp_path, text))
    assert told in line


def test_an_empty_config_file_changes_nothing(tmp_path: Path) -> None:
    """A file whose lines are all commented out is no error."""
    assert values("--config", config(tmp_path, "# lr: 1\n")) == values()


def test_a_missing_config_file_is_named() -> None:
    """`--config` with a wrong path must not train with defaults."""
    assert faults("--config", "nowhere.yaml") == [
        "--config nowhere.yaml: cannot be read: No such file or directory; check the path"
    ]


def test_home_is_expanded_where_the_shell_does_not(tmp_path: Path) -> None:
    """`--logs=~/runs` and YAML would make a folder named ~."""
    assert values("--logs=~/runs")["logs"] == Path.home() / "runs"
    assert values("--config", config(tmp_path, "train_data: ~/a.csv"))["train_data"] == Path.home() / "a.csv"


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_shows_an_example_that_parses(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands at the top of the help is what a newcomer pastes first."""
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    told = capsys.readouterr().out
    assert told.index("example:") < told.index("--config")
    assert EXAMPLES[verb] in told
    run = function_of(verb)

    class Parsed(Exception):  # noqa: N818
        pass

    def parsed(*arguments: Any) -> None:
        parse(*arguments)
        raise Parsed

    monkeypatch.setitem(run.__globals__, "parse", parsed)
    monkeypatch.setattr("clipgraft.cli.parser.parse", parsed)  # for commands that import it when they run
    monkeypatch.chdir("/")
    with pytest.raises(Parsed):
        run(shlex.split(EXAMPLES[verb])[2:])


def test_help_of_train_goes_by_need(capsys: pytest.CaptureFixture[str]) -> None:
    """146 lines that began with --device hid what every run needs."""
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    told = capsys.readouterr().out
    headings = ["model:", "data:", "adapter:", "training:", "output:", "machine:", "rarely needed:"]
    places = [told.index(f"\n{name}\n") for name in headings]
    assert places == sorted(places)
    assert told.index("--use-lora") < told.index("--lora-r ") < told.index("--lora-alpha")
    missing = [name for group in grouped(KINDS) for name in group.fields if flag(name) not in told]
    assert missing == []


@pytest.mark.parametrize("words", [["--use-lora", "true"], ["--use-lora=true"], ["--use-lora", "False"]])
def test_switches_take_no_value(words: list[str]) -> None:
    """Other tools write `--flag true`; the answer must say what to write here."""
    (line,) = faults(*words)
    assert line.startswith(
        "--use-lora is a switch and takes no value: write --use-lora alone, or --no-use-lora"
    )
