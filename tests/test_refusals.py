"""Every refusal of the catalogue: exit code 2, the one line that it promises, and nothing that was there is changed."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import refusals
from refusals import Case

from fastcpt import cli

CASES = refusals.catalogue()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.id}: {case.when}")
def test_what_is_wrong_is_refused(case: Case, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(command: list[str]) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.main(command)
        return code, capsys.readouterr().err

    refusals.refuse(case, work, run)


def test_the_command_itself_exits_with_2(work: Path) -> None:
    """The same through a process of its own, for a dozen that need nothing of this one."""

    def run(command: list[str]) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "fastcpt.cli", *command], check=False, capture_output=True, text=True
        )
        return done.returncode, done.stderr

    commands = ("prep", "convert", "inspect", "report", "demo", "verify shards", "train --config runs")
    chosen = [case for case in CASES if case.command.startswith(commands) and "ray" not in case.id]
    chosen = chosen[:: len(chosen) // 12]
    assert len(chosen) >= 12 and len({case.command.split()[0] for case in chosen}) >= 4
    for number, case in enumerate(chosen):
        copy = work.parent / str(number) / "work"
        shutil.copytree(work, copy)
        os.chdir(copy)
        refusals.refuse(case, copy, run)


def test_there_are_enough_and_none_twice() -> None:
    assert len(CASES) >= 60 and len({case.id for case in CASES}) >= 60
    assert len({(case.id, case.when) for case in CASES}) == len(CASES)


def test_the_page_is_up_to_date_and_complete() -> None:
    """If not: `python tests/refusals.py`."""
    page = refusals.PAGE.read_text(encoding="utf-8")
    assert page == refusals.page()
    known = refusals.source_ids()
    assert len(known) >= 150
    for id in {*known, *(case.id for case in CASES)}:
        assert f"| `{id}` |" in page
    assert {case.id for case in CASES} <= known.keys()


def test_every_error_of_the_source_names_its_id() -> None:
    """A word that the page can list, or the id of an error that is raised again; never a message in its place."""
    known, passed_on = refusals.source_ids(), {"id", "error.id", "*told"}
    for room in refusals.ROOMS:
        for path in (refusals.ROOT / room).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("UserError", "DamagedError"):
                    first = node.args[0]
                    if isinstance(first, ast.Constant):
                        assert first.value in known, f"{path}:{node.lineno}"
                    else:
                        text = ast.unparse(first)
                        assert text in passed_on or "reject.reason" in text, f"{path}:{node.lineno}"
