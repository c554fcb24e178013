"""The image, the unit of systemd and the settings beside it: what can be known of them without either."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path

import pytest

from clipgraft.cli.flags.serve import SERVE
from clipgraft.cli.parser import parse
from clipgraft.serve.args import WebArgs

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
UNIT = ROOT / "deploy/clipgraft.service"


def serve_words(command: list[str]) -> list[str]:
    """The flags of a `clipgraft serve` command."""
    at = command.index("serve")
    assert Path(command[at - 1]).name == "clipgraft"
    return command[at + 1 :]


def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text(encoding="utf-8"))
    return parser["Service"]


def test_the_image_is_built_of_files_that_are_there() -> None:
    """`docker build` would end at a file that was moved, or send gigabytes of runs along."""
    copied = [word for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.M) for word in line.split()[:-1]]
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert copied
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name.removeprefix('./')}" in allowed
    assert allowed[1] == "*"


def test_the_image_starts_a_server() -> None:
    """The container would end with a line about a flag, or listen where nobody can reach it."""
    entry = json.loads(re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.M)[0])
    example = re.findall(r"^#   docker run .* clipgraft (--.+)$", DOCKERFILE, re.M)[0]
    _, service, web = parse("serve", "", SERVE, [*serve_words(entry), *shlex.split(example)])
    assert (web.host, str(web.port)) == ("0.0.0.0", re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.M)[0])
    assert service.adapters == ("vi=logs/vi",)
    check = json.loads(re.findall(r"^HEALTHCHECK .*\\\n\s+(.+)$", DOCKERFILE, re.M)[0])
    assert check[0] == "python"
    compile(check[2], "HEALTHCHECK", "exec")
    assert f":{web.port}/health" in check[2]
    assert 'pip install --no-cache-dir ".[serve]"' in DOCKERFILE


def test_the_unit_starts_what_it_installs() -> None:
    """`systemctl enable --now` would fail, or kill the model before its requests are answered."""
    service = unit()
    words = shlex.split(service["ExecStart"])
    assert serve_words(words) == ["--config", "/etc/clipgraft/serve.yaml"]
    _, _, web = parse("serve", "", SERVE, ["--config", str(ROOT / "deploy/serve.yaml")])
    for path in re.findall(r"deploy/\S+", UNIT.read_text(encoding="utf-8")):
        assert (ROOT / path).is_file()
    assert service["KillMode"] == "mixed"
    assert float(service["TimeoutStopSec"]) > web.drain_seconds + 10
    assert service["RestartPreventExitStatus"] == "2"


def test_the_settings_that_are_commented_out_parse_too(tmp_path: Path) -> None:
    """Whoever takes a # away would get a line about a flag."""
    text = (ROOT / "deploy/serve.yaml").read_text(encoding="utf-8")
    offered = tmp_path / "serve.yaml"
    offered.write_text(re.sub(r"^# (?=[a-z-]+: [\[/])", "", text, flags=re.M), encoding="utf-8")
    _, service, web = parse("serve", "", SERVE, ["--config", str(offered)])
    assert service.adapters == ("vi=/srv/clipgraft/vi", "fr=/srv/clipgraft/fr")
    assert isinstance(web, WebArgs)
    assert web.api_keys is not None


@pytest.mark.parametrize("name", ["HF_HOME", "CLIPGRAFT_CACHE"])
def test_caches_outlive_the_process(name: str) -> None:
    """Each start would fetch the model again, or fail as there is nowhere to write."""
    assert f"{name}=/cache/" in DOCKERFILE
    assert f"{name}=/var/cache/clipgraft/" in unit()["Environment"]
