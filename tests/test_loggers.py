"""What real runs leave with the real loggers after a kill and a resume, and what they show on a real terminal."""

import fcntl
import json
import os
import pickle
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastcpt import guidance, train
from fastcpt.config import Config, Count, Source, ValidationSet
from fastcpt.data_prep.progress import Meter
from fastcpt.metrics import console_line, scalars
from fastcpt.progress import Bar

SEQ_LEN, BATCH, STEPS = 16, 6, 9


@pytest.fixture
def make_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_shards: Any, random_documents: Any, tiny_config: Any
) -> Callable[..., Config]:
    """make_config(name, **run): a run of STEPS steps, a checkpoint every four, each step logged, some evaluated."""
    monkeypatch.setattr("fastcpt.metrics.measured_matmul_rate", lambda *arguments, **options: 1e12)  # it takes its time
    for seed, name in enumerate(("text", "text-val")):
        write_shards(tmp_path / name, random_documents(seed, 35))

    def make(name: str = "run", **run: Any) -> Config:
        size = BATCH * SEQ_LEN
        return tiny_config(
            tmp_path / name,
            data={
                "train": [Source(name="text", path=str(tmp_path / "text"), weight=1.0)],
                "val": [ValidationSet(name="a/b", path=str(tmp_path / "text-val"), role="upstream")],
                "seq_len": SEQ_LEN,
            },
            train={"tokens": Count(STEPS * size), "batch_tokens": Count(size), "compile": False, "precision": "fp32"},
            schedule={"warmup": 0.0},
            run={
                "output": str(tmp_path / name), "log_every": 1, "eval_every": 3, "save_every": 4,
                "eval_tokens": Count(100), "tensorboard": False, **run,
            },
        )  # fmt: skip

    return make


def lines(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.output) / "metrics.jsonl").read_text().splitlines()]


# Trains a pickled configuration, and kills itself before a step.
KILLED = """
import os, pickle, signal, sys
from fastcpt import metrics, train
metrics.measured_matmul_rate = lambda *arguments, **options: 1e12
real = train.train_step
def step(state, batch):
    if state.step + 1 == int(sys.argv[2]):
        state.saver.wait()  # however slow the disk
        os.kill(os.getpid(), signal.SIGKILL)
    return real(state, batch)
train.train_step = step
train.train(pickle.load(open(sys.argv[1], "rb")))
"""


def run_killed(folder: Path, config: Config, before_step: int) -> int:
    """Its exit code. Each start is a process of its own: a real kill, and no state of wandb's that could help."""
    (folder / "config").write_bytes(pickle.dumps(config))
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(folder / "config"), str(before_step)]
    return subprocess.run(
        command, check=False, cwd=folder, env={**os.environ, **offline}, capture_output=True, timeout=120
    ).returncode


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: a LevelDB log (blocks of 32 KiB, fragments of type 1 full, 2 first, 3 middle,
    4 last) of protocol buffers, after a header of 7 bytes. The library reads it in Go alone."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def wandb_history(path: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, values) of each row that W&B has recorded, without its own fields."""
    rows = []
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            values = {name: value for name, value in items.items() if not name.startswith("_")}
            assert items["_step"] == record.history.step.num
            rows.append((items["_step"], values))
    return rows


def tensorboard_scalars(folder: Path) -> dict[tuple[int, str], list[float]]:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    found: dict[tuple[int, str], list[float]] = {}
    for name in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(name):
            found.setdefault((event.step, name), []).append(event.value)
    return found


def test_a_killed_and_resumed_run_is_whole_in_every_log(tmp_path: Path, make_config: Any) -> None:
    """Killed before step 7 with a checkpoint of step 4, when W&B had written nothing yet; then gone on to the end."""
    pytest.importorskip("wandb")
    config = make_config(wandb="project", tensorboard=True)
    output = Path(config.run.output)
    assert run_killed(tmp_path, config, before_step=7) == -signal.SIGKILL
    assert [line["step"] for line in lines(config)][-1] == 6, "later than the checkpoint, so it comes again"
    name = (output / "wandb-id").read_text()
    assert run_killed(tmp_path, config, before_step=99) == 0
    expected: dict[int, dict[str, float]] = {}
    for line in lines(config):
        row = expected.setdefault(line["step"], {"tokens": line["tokens"]})
        assert not scalars(line).keys() & row.keys(), "two lines of a step share no name"
        row |= scalars(line)
    assert list(expected) == list(range(STEPS + 1))
    assert {"loss", "eval/a/b/loss"} < expected[6].keys() and "eval/a/b/loss" not in expected[5]

    folders = sorted((output / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(f"-{name}") for folder in folders)
    assert (output / "wandb-id").read_text() == name
    records = list(wandb_records(folders[1] / f"run-{name}.wandb"))
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.project) == (name, "project")
    assert wandb_history(folders[1] / f"run-{name}.wandb") == list(expected.items())

    shown = tensorboard_scalars(output / "tensorboard")
    wanted = {(line["step"], key): value for line in lines(config) for key, value in scalars(line).items()}
    assert shown == {key: [float(torch.tensor(value, dtype=torch.float32))] for key, value in wanted.items()}


class Terminal:
    """A pseudo-terminal of 100 columns: what was written to it, and what a person would see in the end."""

    WIDTH = 100

    def __init__(self) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, self.WIDTH, 0, 0))
        self.stream: TextIO = open(theirs, "w", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        self._written = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while data := os.read(self._ours, 65536):
                self._written += data
        except OSError:  # how Linux says that the other end was closed
            pass

    def written(self) -> str:
        """All so far: a mark of our own is waited for, and what came before it has come."""
        self.stream.write("\x00")
        self.stream.flush()
        while not self._written.endswith(b"\x00"):
            time.sleep(0.001)
        del self._written[-1]
        return self._written.decode()

    def close(self) -> str:
        """All that was written."""
        self.stream.close()
        self._reader.join(timeout=30)
        os.close(self._ours)
        return self._written.decode()

    @classmethod
    def screen(cls, written: str) -> list[str]:
        """The lines of the screen, of any height. Knows what rich uses, and nothing else."""
        rows, row, column = [""], 0, 0
        for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[^\x1b]", written):
            if token == "\x1b[2K":
                rows[row] = ""
            elif match := re.fullmatch(r"\x1b\[(\d+)A", token):
                row -= int(match[1])
            elif token == "\r":
                column = 0
            elif token == "\n":
                row += 1
            elif token.startswith("\x1b"):
                assert token.endswith("m") or token in ("\x1b[?25l", "\x1b[?25h"), repr(token)
                continue
            else:
                if column == cls.WIDTH:
                    row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
                rows[row] = rows[row][:column].ljust(column) + token + rows[row][column + 1 :]
                column += 1
            rows += [""] * (row + 1 - len(rows))
        while rows and not rows[-1].strip():
            del rows[-1]
        return [line.rstrip() for line in rows]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Terminal]]:
    """terminal() -> a new one; rich looks for its width in the environment, since the tests have no terminal."""
    for name, value in (("COLUMNS", "100"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "LINES"):
        monkeypatch.delenv(name, raising=False)
    yield Terminal


def wrapped(text: str) -> list[str]:
    """As a terminal breaks long lines."""
    width = Terminal.WIDTH
    return [
        line[start : start + width].rstrip()
        for line in text.splitlines()
        for start in range(0, max(1, len(line)), width)
    ]


def train_on(monkeypatch: pytest.MonkeyPatch, config: Config, stdout: TextIO, stderr: TextIO) -> str:
    """Trains with these streams. Returns the lines that a run shows in any case."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", stderr)
        state = train.train(config)
        assert (sys.stdout, sys.stderr) == (stdout, stderr), "given back"
    state.step = 0  # what was printed is of the start
    shown = [train.describe(state).replace("resume: step 0", "scratch: new weights")]
    shown += [f"advice: {text}" for text in guidance.advice(state)]
    return "\n".join(shown + [console_line(line, state.last_step) for line in lines(config)]) + "\n"


def moves(written: str) -> list[str]:
    """The steps that a bar showed."""
    return re.findall(rf" (\d+)/{STEPS} ", re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", written))


def test_a_run_on_a_terminal_has_a_bar_below_its_lines(
    make_config: Any, terminal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastcpt.progress.REDRAW_SECONDS", -1.0)
    tty = terminal()
    expected = train_on(monkeypatch, make_config(), tty.stream, tty.stream)
    written = tty.close()
    assert Terminal.screen(written) == wrapped(expected), "in the end the lines are there, and nothing else"
    for line in expected.splitlines():
        assert f"{line}\r\n" in written, "whole, without a code in it"
    bars = [row for row in written.split("\r") if "━" in row]
    assert bars and all("train" in row for row in bars)
    assert set(moves(written)) == {str(step) for step in range(STEPS + 1)}
    assert "evaluating" in written and "saving" in written and "tokens/s" in bars[-1]
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l"), "the cursor is back"


def test_the_bar_stands_below_the_lines_while_the_run_goes_on(
    make_config: Any, terminal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The screen before a step, a warning of somebody else's among the lines."""
    tty = terminal()
    seen: list[list[str]] = []
    real = train.train_step

    def step(state: train.State, batch: Any) -> Any:
        if state.step == 4:
            print("warning: something", file=sys.stderr)
        if state.step == 6:
            seen.append(Terminal.screen(tty.written()))
        return real(state, batch)

    monkeypatch.setattr(train, "train_step", step)
    expected = train_on(monkeypatch, make_config(), tty.stream, tty.stream).splitlines()
    tty.close()
    assert "warning: something" in seen[0]
    *above, bar = [line for line in seen[0] if line != "warning: something"]
    assert above == wrapped("\n".join(line for line in expected if not re.match(r"step [789]/", line)))
    assert re.fullmatch(r"train ━+.*  67%  6/9  0m00s left  loss \d\.\d{4}  576 tokens  \S+ tokens/s", bar), bar


def test_lines_sent_to_a_file_are_plain_and_the_bar_is_on_stderr(
    tmp_path: Path, make_config: Any, terminal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tty = terminal()
    with open(tmp_path / "out", "w", encoding="utf-8") as file:
        expected = train_on(monkeypatch, make_config(), file, tty.stream)
    assert (tmp_path / "out").read_text() == expected
    assert moves(written := tty.close()) and Terminal.screen(written) == []


def test_warnings_sent_to_a_file_stay_out_of_the_terminal(
    tmp_path: Path, make_config: Any, terminal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tty = terminal()
    real = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *each: print("warning", file=sys.stderr) or real(*each))
    with open(tmp_path / "err", "w", encoding="utf-8") as file:
        expected = train_on(monkeypatch, make_config(), tty.stream, file)
    assert (tmp_path / "err").read_text() == "warning\n" * STEPS
    assert Terminal.screen(tty.close()) == wrapped(expected)


def test_a_run_without_a_terminal_writes_lines_alone(
    tmp_path: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which would make rich colour a file
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        expected = train_on(monkeypatch, make_config(), out, err)
    assert (tmp_path / "out").read_text() == expected and (tmp_path / "err").read_text() == ""


def test_a_run_without_rich_writes_lines_alone(
    make_config: Any, terminal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rich", "rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    tty = terminal()
    expected = train_on(monkeypatch, make_config(), tty.stream, tty.stream)
    assert tty.close() == expected.replace("\n", "\r\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt, train.Diverged])
def test_the_bar_is_gone_before_an_error_is_told(
    make_config: Any, terminal: Any, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    tty = terminal()
    real = train.train_step

    def failing(state: train.State, batch: Any) -> Any:
        if state.step == 5:
            raise error
        return real(state, batch)

    monkeypatch.setattr(train, "train_step", failing)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", tty.stream)
        patch.setattr(sys, "stderr", tty.stream)
        try:
            train.train(make_config())
        except error:
            print("what went wrong", file=sys.stderr)
    screen = Terminal.screen(written := tty.close())
    assert screen[-1] == "what went wrong" and not any("━" in line for line in screen)
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l"), "the cursor is back"


@pytest.mark.parametrize("columns", [20, 50, 70, 200])
def test_a_bar_is_one_line_of_any_terminal(terminal: Any, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    tty = terminal()
    text = "1,234/110,575  12h34m left  loss 2.3457  2.79B tokens  236K tokens/s"
    with Bar("train", 100, stream=tty.stream) as bar:
        bar.update(50, text, now=True)
    plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", tty.close())
    drawn = [row for row in re.split(r"[\r\n]+", plain) if "train" in row]
    assert drawn and all(len(row) <= columns for row in drawn)
    assert text[: columns - 20] in drawn[-1]
    if columns == 200:
        assert drawn[-1].rstrip() == f"train {'━' * 20}{'╺'}{'━' * 19}  50%  {text}"


def test_a_meter_is_a_bar_on_a_terminal_and_quiet_when_asked(
    terminal: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tty = terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", tty.stream)
        for quiet in (False, True):
            with Meter("tokenize", 3_000_000, quiet) as meter:
                meter.skip(1_000_000)
                meter.add(500_000, 1000)
                meter.add(1_500_000, 9000)
    (line,) = Terminal.screen(tty.close())
    assert re.fullmatch(r"tokenize ━+ 100%  2\.0/2\.0 MB  [\d.,]+M? tokens/s  0m00s left", line), line
    assert capfd.readouterr() == ("", "")
