"""Signals end a run in order. The trials of two ranks and of torchrun are those of `soak_signals.py`."""

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcpt import train
from fastcpt.parallel import World
from fastcpt.signals import SIGNALS, Agreement, Preempted, Signals

ALONE = World(0, 1, torch.device("cpu"))


def test_a_handler_sets_a_flag_and_is_taken_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        assert not signals.received
    assert signal.getsignal(signal.SIGTERM) is before
    for number in (signal.SIGTERM, signal.SIGUSR1):
        handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)]
        try:
            with Signals() as signals:
                os.kill(os.getpid(), number)
                assert signals.received
                os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # on the way out: ignored
        finally:
            for each, handler in zip((signal.SIGTERM, signal.SIGUSR1), handlers):
                signal.signal(each, handler)


def test_other_threads_train_without_handlers() -> None:
    outcomes = []

    def enter() -> None:
        with Signals() as signals:
            outcomes.append(signals.received)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert outcomes == [False]


def test_one_process_agrees_with_itself_at_once() -> None:
    signals = Signals()
    agreement = Agreement(ALONE, signals, 1.0)
    agreement.ask()
    assert not agreement.answer()
    signals.received = True
    assert agreement.answer()


TWO = """
import json, torch
from fastcpt.parallel import start
from fastcpt.signals import Agreement, Signals

world, signals, answers = start("auto"), Signals(), []
agreement = Agreement(world, signals, 30.0)
for step in range(4):
    agreement.ask()
    signals.received |= step == 1 and world.rank == 1
    if step != 2 or len(sys.argv) == 1:
        answers.append(agreement.answer())
print(json.dumps(answers))
"""


@pytest.mark.parametrize(("unanswered", "answers"), [([], [0, 0, 1, 1]), (["once"], [0, 0, 1])])
def test_what_one_wants_all_learn_with_the_next_question(
    run_ranks: Callable, unanswered: list[str], answers: list[int]
) -> None:
    assert [json.loads(output.splitlines()[-1]) for output in run_ranks(TWO, 2, *unanswered)] == [answers] * 2


@pytest.fixture
def config(tmp_path: Path, write_shards: Any, random_documents: Any, tiny_config: Any) -> Callable[[str], Any]:
    from fastcpt.config import Count, Source, ValidationSet

    write_shards(tmp_path / "new", random_documents(0, 60))
    write_shards(tmp_path / "val", random_documents(1, 20))
    return lambda name: tiny_config(
        tmp_path / name,
        data={
            "train": [Source(name="new", path=str(tmp_path / "new"), weight=1.0)],
            "val": [ValidationSet(name="val", path=str(tmp_path / "val"), role="upstream")],
            "seq_len": 16,
        },
        train={"tokens": Count(9 * 96), "batch_tokens": Count(96), "compile": False, "precision": "fp32"},
        run={"tensorboard": False, "log_every": 3, "eval_every": 4, "save_every": 5, "eval_tokens": Count(200)},
    )


def timeless(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in train.metrics.TIMING_FIELDS} for line in lines]


# Where a signal comes, at which passage of it, and the step that is saved: an evaluation is left at a micro-batch, and
# is done when the run goes on. Evaluations: at 0, by the warm-up's end at 1, at 4, 8 and 9; four micro-batches each.
@pytest.mark.parametrize(
    ("where", "passage", "saved"),
    [("step", 1, 1), ("step", 4, 4), ("step", 5, 5), ("evaluation", 1, 0), ("evaluation", 6, 1), ("evaluation", 18, 9)],
)
def test_one_process_saves_at_once_and_goes_on_as_if_nothing_had_been(
    config: Callable, monkeypatch: pytest.MonkeyPatch, capfd: Any, where: str, passage: int, saved: int
) -> None:
    reference, cut = config("reference"), config("cut")
    expected = train.train(reference)
    owner, name = (train, "train_step") if where == "step" else (train.evaluation.ShardSet, "windows")
    real, passed = getattr(owner, name), []

    def signalled(*arguments: Any) -> Any:
        passed.append(1)
        if len(passed) == passage:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(*arguments)

    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        with pytest.raises(Preempted, match=f"preempted at step {saved}, saved in"):
            train.train(cut)
    signal.signal(signal.SIGUSR1, before[0])
    signal.signal(signal.SIGTERM, before[1])
    output = Path(cut.run.output)
    assert (output / "exit-code").read_text() == "75\n" and f"preempted at step {saved}" in capfd.readouterr().out
    assert max(train.checkpoint.steps(output)) == saved
    state = train.train(cut)
    assert (output / "exit-code").read_text() == "0\n"
    tensors, wanted = train.named_tensors(state), train.named_tensors(expected)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items())
    assert timeless(output) == timeless(Path(reference.run.output))
    # Complete, whatever its last checkpoint says of the evaluation that the signal cut short: it is not done again.
    monkeypatch.setattr(train.evaluation, "evaluate", lambda *arguments, **options: 1 / 0)
    train.train(cut)
    assert timeless(output) == timeless(Path(reference.run.output))


def test_a_signal_while_the_model_is_compiled(config: Callable, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """It comes in the compiler; the first step is done, and saved."""
    from torch._inductor import compile_fx

    eager = config("run")
    eager = replace(eager, data=replace(eager.data, val=[]), train=replace(eager.train, micro_batch=6))  # one graph
    real = compile_fx.compile_fx

    def signalled(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    with monkeypatch.context() as patch:
        patch.setattr(compile_fx, "compile_fx", signalled)
        with pytest.raises(Preempted, match="preempted at step 1, saved in"):
            train.train(replace(eager, train=replace(eager.train, compile=True)))
    for number, handler in before.items():  # ignored from then on, which the tests after this one would inherit
        signal.signal(number, handler)
    output = Path(eager.run.output)
    assert (output / "exit-code").read_text() == "75\n" and train.checkpoint.steps(output) == [1]
    assert train.train(eager).step == 9 and "resume: step 1;" in capfd.readouterr().out


STUBS = {
    "srun": 'exec "$@"',
    # As torchrun: gets the signal, waits for its processes, and exits with 1 whatever their code was.
    "torchrun": 'echo "$@" > arguments; trap "echo $CODE > runs/cpt-410m/exit-code; exit 1" USR1; touch up; '
    "while true; do sleep 0.05; done",
    "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" >> requeued; fi',
}


@pytest.mark.parametrize(("name", "code"), [("README.md", 75), ("README.zh.md", 75), ("README.md", 3)])
def test_the_slurm_script_passes_the_signal_on_and_queues_again(tmp_path: Path, name: str, code: int) -> None:
    """With stubs for Slurm's commands and torchrun's: there is no Slurm here."""
    readme = (Path(__file__).parent.parent / name).read_text(encoding="utf-8")
    (script,) = re.findall(r"```bash\n(#!/bin/bash.*?)```", readme, re.DOTALL)
    (tmp_path / "runs" / "cpt-410m").mkdir(parents=True)
    (tmp_path / "runs" / "cpt-410m" / "exit-code").write_text("75\n")  # of an earlier start: must not count
    for command, text in STUBS.items():
        (tmp_path / command).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / command).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code)}
    environment |= {"SLURM_JOB_ID": "17", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    job = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=environment, start_new_session=True)
    try:
        while not (tmp_path / "up").exists():
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        job.wait(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(job.pid, signal.SIGKILL)
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == ("requeue 17\n" if code == 75 else "")
    arguments = (tmp_path / "arguments").read_text()
    assert "--nnodes=2" in arguments and "--rdzv_endpoint=node1:29500" in arguments and "SIGUSR1" in arguments
