"""The READMEs tell the truth: generated parts are up to date, commands are known, links lead somewhere."""

import contextlib
import re
from pathlib import Path

import pytest
import yaml

from fastcpt import cli
from fastcpt.benchmarks import readme
from fastcpt.config import parse

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.zh.md"]


@pytest.mark.parametrize("name", READMES)
def test_generated_parts_are_up_to_date(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If not: `python -m fastcpt.benchmarks.readme` in the root of the checkout."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / name).read_text(encoding="utf-8")
    assert readme.update(text) == text


@pytest.mark.parametrize("name", READMES)
def test_every_command_and_option_exists(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = re.findall(r"^(?:    |`)(fastcpt [^#`\n]+)", text, re.MULTILINE)
    assert len(lines) >= 9
    for line in lines:
        command, *words = line.split()[1:]
        with contextlib.suppress(SystemExit):
            cli.main([command, "--help"])
        printed = capsys.readouterr().out
        for option in (word for word in words if word.startswith("--")):
            assert option in printed or option == "--config", line


@pytest.mark.parametrize("name", READMES)
def test_the_configuration_loads(name: str, tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(model:.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    assert set(yaml.safe_load(block)) == {"model", "init", "data", "train", "optim", "schedule", "run"}
    (tmp_path / "cpt.yaml").write_text(block)
    assert parse(["--config", str(tmp_path / "cpt.yaml")]).run.output == "runs/cpt-410m"


@pytest.mark.parametrize("name", READMES)
def test_links_lead_to_files_and_the_translation_has_the_same_parts(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).is_file(), target
    headings = [len(re.findall(r"^## ", (ROOT / each).read_text(encoding="utf-8"), re.MULTILINE)) for each in READMES]
    assert headings[0] == headings[1]


@pytest.mark.parametrize("name", READMES)
def test_every_generated_part_is_generated(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- /(\w+) -->", text)) == readme.PARTS.keys()
