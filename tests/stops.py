"""Ranks of a tiny run that meet a signal, a fault or a kill; what `test_signals.py`, `test_watch.py` and the soaks of
training, restarts, signals and hangs share.

    python tests/stops.py FAULT ARGUMENTS...        one rank, as torchrun starts it; FAULT is JSON, see `arm`

Ranks are forked from this process, which has imported torch but run no parallel operator, or started by torchrun. They
are in a session of their own, whose number all their processes carry.
"""

import gc
import hashlib
import json
import mmap
import os
import shutil
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
import torch._dynamo  # as all that a rank imports: before any fork
from safetensors import safe_open

from fastcpt import metrics, saving, shards, signals, train, watch
from fastcpt.metrics import TIMING_FIELDS

SIGNALS = {"TERM": signal.SIGTERM, "USR1": signal.SIGUSR1, "STOP": signal.SIGSTOP, "KILL": signal.SIGKILL}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
            "--shutdown-timeout=3", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]  # fmt: skip
CONFIG = """
model: {layers: 2, width: 24, heads: 3, vocab_size: 64}
data:
  seq_len: 16
  train: [{name: new, path: FOLDER/new, weight: 1.0}]
  val: [{name: val, path: FOLDER/val, role: upstream}]
train:
  {tokens: 1536, batch_tokens: 128, micro_batch: 2, compile: false, precision: fp32, parallel: LAYOUT, deterministic: FIXED}
optim: {lr: 1.0e-3}
run: {output: FOLDER/run, log_every: 3, eval_every: 4, eval_tokens: 200, save_every: SAVE, tensorboard: false, timeout: 3.0}
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
        due = where == fault.get("where") and passed[where] == fault["when"]
        if mine and due and not (here / "acted").exists():  # torchrun may start this again
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
        state.model.layers[0].attention.register_forward_hook(watch_backward)
        return state

    def watch_backward(module: Any, arguments: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: at("backward"))

    def handled(self: Any, number: int, frame: Any) -> None:
        (here / f"received-{os.environ.get('RANK', '0')}").write_text(str(passed.get("step", 0)))
        handle(self, number, frame)

    train.setup, signals.Signals._handle = setup, handled  # type: ignore[method-assign]
    before(train, "train_step", "step", fault.get("slow", 0.0))
    before(train, "save", "save")
    before(shards.ShardSet, "windows", "evaluation", fault.get("slow", 0.0))


def tell_of_saves(notes: Path, rank: int) -> None:
    """Byte `rank` of NOTES/saves is odd while this process is in a save, and stays so when it is killed there; half of it
    is how many there were. NOTES/pid-RANK has the process."""
    with open(notes / "saves", "r+b") as file:
        told = mmap.mmap(file.fileno(), 0)
    told[rank] = 0
    real = saving.write

    def write(*arguments: Any, **options: Any) -> Path:
        told[rank] += 1
        try:
            return real(*arguments, **options)
        finally:
            told[rank] += 1

    saving.write = write
    (notes / f"pid-{rank}").write_text(str(os.getpid()))


def rank(fault: dict[str, Any], arguments: list[str]) -> int:
    torch.set_num_threads(1)
    metrics.peak_flops = lambda *arguments, **options: 1e9  # which takes a second of each start
    arm(fault)
    tell_of_saves(Path(fault["notes"]), int(os.environ.get("RANK", "0")))
    return train.main(arguments)


def _state(pid: int) -> str:
    """R, S, T, Z and so on, "" of no process."""
    return watch._stat(pid)[0]


class Ranks:
    """Forked ranks, or torchrun's. `wait` ends what does not end by itself, as torchrun does."""

    def __init__(
        self,
        folder: Path,
        fault: dict[str, Any],
        torchrun: bool = False,
        size: int = 2,
        restarts: int = 0,
        before: Callable[[int], None] = lambda rank: None,
    ) -> None:
        """before: what each forked rank does before it trains."""
        self.folder, self.size, self.log = folder, size, folder / "log"
        for path in (*folder.glob("received-*"), folder / "acted"):
            path.unlink(missing_ok=True)
        self.forget()
        (folder / "saves").write_bytes(bytes(size))
        fault = {"notes": str(folder), **fault}
        arguments = ["--config", str(folder / "config.yaml")]
        self.started = time.monotonic()
        if torchrun:
            command = [*TORCHRUN, f"--nproc_per_node={size}", f"--max-restarts={restarts}"]
            command += [str(Path(__file__)), json.dumps(fault), *arguments]
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            self.children = [self.process.pid]
            return
        self._before = before
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
            self._before(number)
            code = rank(fault, arguments)
        finally:
            if sys.exc_info()[0]:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)

    def saves(self, rank: int) -> int:
        """See `tell_of_saves`."""
        return (self.folder / "saves").read_bytes()[rank]

    def pids(self) -> list[int]:
        """Of the ranks, when all have come so far that they tell of their saves; else none."""
        try:
            return [int((self.folder / f"pid-{rank}").read_text()) for rank in range(self.size)]
        except (OSError, ValueError):  # not yet there, or being written
            return []

    def forget(self) -> None:
        """The ranks that there are are on their way out: `pids` waits for those that torchrun starts in their place."""
        for path in self.folder.glob("pid-*"):
            path.unlink()

    def kill(self, pid: int) -> None:
        """Returns when that rank is dead."""
        os.kill(pid, signal.SIGKILL)
        assert until(lambda: _state(pid) in ("", "Z", "X"), 10)

    def ended(self) -> bool:
        return all(_state(child) in ("", "Z", "X") for child in self.children)

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
    """What must be as in a run that was never disturbed: hashes of the last checkpoint's tensors and of the metrics
    without their timing fields; its state, but for where it ran and what says that a signal came at the end."""
    last = max((output / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    values = {}
    for path in last.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                values[name, tuple(json.loads(file.metadata()["DCP_SHARDING_INFO"])[name]["saved_offsets"])] = (
                    file.get_tensor(name).tobytes()
                )
    tensors = hashlib.sha256()
    for key in sorted(values):
        tensors.update(repr(key).encode() + values[key])
    state = json.loads((last / "state.json").read_text())
    del state["unevaluated"], state["config"]["run"]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines]
    return {
        "step": last.name,
        "tensors": tensors.hexdigest(),
        "state": json.dumps(state, sort_keys=True),
        "metrics": json.dumps(lines),
    }


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
    """A folder with shards, and with what `reference` makes."""
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        for seed, (name, tokens) in enumerate((("new", 1600), ("val", 480))):
            write_set(folder / name, seed, tokens)
        (folder / "ready").touch()
    return folder


def place_of(prepared: Path, folder: Path, layout: str = "auto", size: int = 2, save_every: int = 5) -> Path:
    """A folder for one trial, on the same data.

    More than two ranks sum in a fixed order: DDP's first step after a start has other buckets than the later ones, and so
    another order of the sums.
    """
    text = CONFIG.replace("FOLDER/run", f"{folder}/run").replace("FOLDER", str(prepared)).replace("LAYOUT", layout)
    text = text.replace("FIXED", str(size > 2).lower()).replace("SAVE", str(save_every))
    (folder / "config.yaml").write_text(text)
    return folder


def reference(prepared: Path, layout: str, size: int) -> dict[str, str]:
    """The outcome of a run that was never disturbed; the run when it is needed first."""
    folder = prepared / f"{layout}-{size}"
    if not (folder / "reference").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        ranks = Ranks(place_of(prepared, folder, layout, size), {}, size=size)
        assert ranks.wait() == [0] * size, ranks.log.read_text()
        (folder / "reference").write_text(json.dumps(outcome(folder / "run")))
    expected: dict[str, str] = json.loads((folder / "reference").read_text())
    return expected


def check_outcome(prepared: Path, folder: Path, layout: str = "auto", size: int = 2) -> None:
    """The run in the folder of a trial has ended as one that was never disturbed."""
    expected, actual = reference(prepared, layout, size), outcome(folder / "run")
    different = [key for key in expected if expected[key] != actual[key]]
    assert not different, f"{different} differ from a run that was never disturbed"


def goes_on(prepared: Path, folder: Path, layout: str = "auto", size: int = 2) -> int:
    """Starts the run of a trial again, without a fault: it must end as the reference. The step from which it went on."""
    ranks = Ranks(folder, {}, size=size)
    codes = ranks.wait()
    assert codes == [0] * size, f"{codes}: {ranks.log.read_text()[-3000:]}"
    check_outcome(prepared, folder, layout, size)
    kind, step = (folder / "origin").read_text().split()
    return int(step) if kind == "resume" else 0


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


gc.freeze()  # ranks that are forked from here need not look through all that was imported

if __name__ == "__main__":
    sys.exit(rank(json.loads(sys.argv[1]), sys.argv[2:]))
