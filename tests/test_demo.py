"""The demo in its quick form, and the point that it makes: both continuations learn, replay forgets less."""

from pathlib import Path

import pytest

from fastcpt import UserError, demo


def test_the_quick_demo_shows_forgetting_and_its_cure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert demo.run(tmp_path / "demo", quick=True) == 0
    last = {name: demo.final(tmp_path / "demo" / "runs" / name) for name in ("pretrain", "continue", "replay")}
    assert last["continue"]["adaptation"] > 0.5 and last["replay"]["adaptation"] > 0.5
    assert last["continue"]["forgetting"] > 0.1
    assert last["replay"]["forgetting"] < 0.5 * last["continue"]["forgetting"]
    printed = capfd.readouterr().out
    assert (tmp_path / "demo" / "result.txt").read_text() in printed
    assert f"{last['continue']['forgetting']:+.3f}" in printed
    # Run again it starts anew; another folder of the user's is left alone.
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="not a demo's folder"):
        demo.run(tmp_path / "mine", quick=True)


def test_source_and_docstrings_part_ways() -> None:
    source = (
        '"""A module."""\nimport os\n\n\ndef f():\n    """One.\n\n    Two.\n    """\n    return "not a docstring"\n'
    )
    docstrings, rest = demo.split_source(source)
    assert docstrings == ["A module.", "One.\n\nTwo."]
    assert rest == 'import os\n\n\ndef f():\n    return "not a docstring"\n'


def test_the_texts_are_the_same_every_time_and_within_the_limit() -> None:
    english, code = demo.texts(300_000)
    assert (english, code) == demo.texts(300_000)
    assert 150_000 < sum(map(len, english)) <= 300_000 and 100_000 < sum(map(len, code)) <= 300_000
    assert not set(english) & set(code)
