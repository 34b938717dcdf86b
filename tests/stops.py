"""Ranks of a tiny run that meet a signal or a fault at a chosen place; what `test_signals.py`, `test_watch.py` and the
soaks of signals and hangs share.

    python tests/stops.py FAULT ARGUMENTS...        one rank, as torchrun starts it; FAULT is JSON, see `arm`

Ranks are forked from this process, which has imported torch but run no parallel operator, or started by torchrun. They
are in a session of their own, whose number all their processes carry.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.tensorboard

from fastcpt import shards, signals, train, watch

SIGNALS = {"TERM": signal.SIGTERM, "USR1": signal.SIGUSR1, "STOP": signal.SIGSTOP, "KILL": signal.SIGKILL}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]  # fmt: skip
CONFIG = """
model: {layers: 2, width: 24, heads: 3, vocab_size: 64}
data:
  seq_len: 16
  train: [{name: new, path: FOLDER/new, weight: 1.0}]
  val: [{name: val, path: FOLDER/val, role: upstream}]
train: {tokens: 1152, batch_tokens: 96, micro_batch: 2, compile: false, precision: fp32}
optim: {lr: 1.0e-3}
run: {output: FOLDER/run, log_every: 3, eval_every: 4, eval_tokens: 200, save_every: 5, tensorboard: false, timeout: 3.0}
"""
STEPS = 12


def act(fault: dict[str, Any]) -> None:
    """Does to this process, or for signals to its parent, what the fault says."""
    what = fault["what"]
    if what in SIGNALS:
        target = os.getppid() if fault.get("target") == "parent" else os.getpid()
        os.kill(target, SIGNALS[what])
    elif what == "sleep":
        time.sleep(10_000)
    elif what == "raise":
        raise ZeroDivisionError("of the test")
    elif what == "exit":
        os._exit(0)
    elif what == "damage":
        raise shards.DamagedError("hash-differs", "new/shard-00000.bin: bytes 0 to 65,536 differ from their hash")
    elif what == "shrink":
        os.truncate(fault["path"], 100)


def arm(fault: dict[str, Any]) -> None:
    """fault: {"rank"; "what": a signal, sleep, raise, exit, damage, shrink ("path"); "where": step, backward, evaluation, save; "when": at which
    passage, from 1; "target": self or parent; "in_save": a second signal; "slow": seconds a step}."""
    mine = int(os.environ.get("RANK", "0")) == fault.get("rank", 0)
    passed: dict[str, int] = {}
    here = Path(fault["notes"])

    def at(where: str) -> None:
        passed[where] = passed.get(where, 0) + 1
        if mine and where == fault.get("where") and passed[where] == fault["when"]:
            (here / "acted").write_text(str(time.time()))
            act(fault)
        if where == "save" and mine and fault.get("in_save") and (here / "acted").exists():
            act({**fault, "what": fault["in_save"]})

    def before(owner: Any, name: str, where: str, pause: float = 0.0) -> None:
        real = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            at(where)
            time.sleep(pause)
            return real(*arguments, **options)

        setattr(owner, name, wrapped)

    real_setup, handle = train.setup, signals.Signals._handle

    def setup(config: Any) -> Any:
        state = real_setup(config)
        if int(os.environ.get("RANK", "0")) == 0:
            (here / "origin").write_text(f"{state.origin.kind} {state.step}")
        state.model.layers[0].attention.dense.weight.register_hook(lambda gradient: at("backward"))
        return state

    def handled(self: Any, number: int, frame: Any) -> None:
        (here / f"received-{os.environ.get('RANK', '0')}").write_text(str(passed.get("step", 0)))
        handle(self, number, frame)

    train.setup, signals.Signals._handle = setup, handled  # type: ignore[method-assign]
    before(train, "train_step", "step", fault.get("slow", 0.0))
    before(train, "save", "save")
    before(shards.ShardSet, "windows", "evaluation", fault.get("slow", 0.0))


def rank(fault: dict[str, Any], arguments: list[str]) -> int:
    torch.set_num_threads(1)
    arm(fault)
    return train.main(arguments)


class Ranks:
    """Two forked ranks, or torchrun's. `wait` ends what does not end by itself, as torchrun does."""

    def __init__(
        self, folder: Path, fault: dict[str, Any], torchrun: bool = False, size: int = 2, **options: Any
    ) -> None:
        self.log = folder / "log"
        for path in folder.glob("received-*"):
            path.unlink()
        (folder / "acted").unlink(missing_ok=True)
        fault = {"notes": str(folder), **fault}
        arguments = ["--config", str(folder / "config.yaml")]
        arguments += [part for name, value in options.items() for part in (f"--run.{name}", str(value))]
        self.started = time.monotonic()
        if torchrun:
            command = [*TORCHRUN, "--shutdown-timeout=3", str(Path(__file__)), json.dumps(fault), *arguments]
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            self.children = [self.process.pid]
            return
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.children = [self._fork(number, size, port, fault, arguments) for number in range(size)]

    def _fork(self, number: int, size: int, port: int, fault: dict[str, Any], arguments: list[str]) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            os.setsid()
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = (os.fdopen(file, "w", buffering=1) for file in (1, 2))
            if size > 1:
                os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = rank(fault, arguments)
        finally:
            if sys.exc_info()[0]:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)

    def wait(self, seconds: float = 60.0, grace: float = 2.0) -> list[int]:
        """Exit codes. When one has failed the others get `grace` seconds, as from torchrun; nothing lasts longer than asked."""
        deadline = self.started + seconds
        codes: dict[int, int] = {}
        while len(codes) < len(self.children):
            time.sleep(0.01)
            for child in [each for each in self.children if each not in codes]:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
            if any(code not in (0, 75) for code in codes.values()):
                deadline = min(deadline, time.monotonic() + grace)
            if time.monotonic() > deadline:
                for child in self.children:
                    if child not in codes:
                        os.kill(child, signal.SIGKILL)
        self.seconds = time.monotonic() - self.started
        return [codes[child] for child in self.children]

    def left_over(self) -> list[int]:
        """Living processes of this run: in the sessions of forked ranks, or with its configuration in their arguments, as
        those that torchrun starts in sessions of their own."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                arguments = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            ours = int(fields[3]) in self.children or f"{self.log.parent}/config.yaml".encode() in arguments
            if ours and fields[0] != "Z":
                found.append(int(folder.name))
        return found


def outcome(output: Path) -> dict[str, str]:
    """What must be as in a run that was never disturbed: `crash.digest`, but for what says that a signal came at the end."""
    import crash

    values = crash.digest(output)
    state = json.loads((output / "checkpoints" / values["step"] / "state.json").read_text())
    del state["unevaluated"], state["config"]["run"]
    return values | {"state": json.dumps(state, sort_keys=True)}


def write_set(folder: Path, seed: int, tokens: int) -> None:
    """Random ids below 64; the end-of-document token is 0."""
    folder.mkdir(parents=True)
    vocabulary = {"<0>": 0} | {f"{token:x}": token for token in range(1, 64)}
    content: dict[str, Any] = {"added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None}
    content["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<0>"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    np.save(folder / "token_bytes.npy", np.arange(64, dtype=np.uint16) % 7)
    writer = shards.PairWriter(folder, "shard-00000", np.dtype(np.uint16))
    ids = np.random.default_rng(seed).integers(0, 64, tokens).astype(np.uint16)
    writer.write(ids, np.array([tokens], np.int32))
    tokenizer = {
        "fingerprint": shards.tokenizer_fingerprint((folder / "tokenizer.json").read_bytes()),
        "vocab_size": 64,
        "eod": 0,
        "eod_token": "<0>",
    }
    shards.write_manifest(
        folder, tokenizer=tokenizer, dtype=np.dtype(np.uint16), text_bytes=tokens, pairs=[writer.close()],
        files=["tokenizer.json", "token_bytes.npy"],
    )  # fmt: skip


def prepare(folder: Path) -> Path:
    """A folder with shards, a configuration and, in `reference`, the outcome of a run that was never disturbed."""
    for seed, (name, tokens) in enumerate((("new", 1600), ("val", 480))):
        write_set(folder / name, seed, tokens)
    (folder / "config.yaml").write_text(CONFIG.replace("FOLDER", str(folder)))
    ranks = Ranks(folder, {})
    assert ranks.wait() == [0, 0], ranks.log.read_text()
    (folder / "reference").write_text(json.dumps(outcome(folder / "run")))
    return folder


def place_of(prepared: Path, folder: Path) -> Path:
    """A folder for one trial, on the same data."""
    (folder / "config.yaml").write_text(CONFIG.replace("FOLDER/run", f"{folder}/run").replace("FOLDER", str(prepared)))
    return folder


def goes_on(prepared: Path, folder: Path) -> int:
    """Starts the run of a trial again, without a fault: it must end as the reference. The step from which it went on."""
    ranks = Ranks(folder, {})
    codes = ranks.wait()
    assert codes == [0, 0], f"{codes}: {ranks.log.read_text()[-3000:]}"
    expected, actual = json.loads((prepared / "reference").read_text()), outcome(folder / "run")
    different = [key for key in expected if expected[key] != actual[key]]
    assert not different, f"{different} differ from a run that was never disturbed"
    kind, step = (folder / "origin").read_text().split()
    return int(step) if kind == "resume" else 0


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


assert watch.LOST  # imported here, before any fork

if __name__ == "__main__":
    sys.exit(rank(json.loads(sys.argv[1]), sys.argv[2:]))
