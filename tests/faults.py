"""Every operation of a save on the file system, stopped at once: by a kill, a loss of power, a disk that fails.

    python tests/faults.py kills|power|errors --world 1|2 [--first] [--seed S] FOLDER

A run has a checkpoint of step 2 (none with --first); the one of step 4 is saved and then the first removed. `os.write`,
`os.fsync`, `os.rename` and so on go through a shim that counts them.

kills   the process ends at its Nth operation, before it or in the middle of a write, for each N and each process
power   the operations are recorded; the folder is built again for each of their beginnings, without what no fsync had
        covered: contents cut, zeros in their place, or kept; names lost, kept, or kept up to some point
errors  from the Nth operation on the disk is full, or fails: that ends the save with a message, or, once the new
        checkpoint is committed, is a warning

After each, the loader must give one of the two checkpoints, bit by bit. Prints a tally; exits 1 if a trial fails.
"""

import argparse
import base64
import contextlib
import errno
import io
import json
import os
import random
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastcpt import UserError, checkpoint, saving
from fastcpt.parallel import World

STEPS = (2, 4)
NAMES = ("write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {f"model.{name}": torch.randn(size, generator=generator) for name, size in zip("abc", (300_000, 300, 7))}


def place(argument: Any, dir_fd: int | None = None) -> str:
    """The path that an argument of an operation means, a descriptor's among them."""
    if isinstance(argument, int):
        return os.readlink(f"/proc/self/fd/{argument}")
    return os.path.join("" if dir_fd is None else place(dir_fd), argument)


@contextlib.contextmanager
def shim(hook: Callable[[str, list[Any], Callable[[], Any]], Any]) -> Iterator[None]:
    """Operations of this process go through hook(name, [path or paths, data], the operation itself)."""
    real = {name: getattr(os, name) for name in NAMES}

    def wrap(name: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            where = [place(arguments[0], options.get("dir_fd"))]
            if name == "write" and not where[0].startswith("/tmp/") and not Path(where[0]).is_file():
                return real[name](*arguments)  # a pipe or a terminal
            where += [place(arguments[1])] if name in ("rename", "replace") else []
            where += [bytes(arguments[1])] if name == "write" else []
            return hook(name, where, lambda: real[name](*arguments, **options))

        return wrapped

    try:
        for name in NAMES:
            setattr(os, name, wrap(name))
        yield
    finally:
        for name in NAMES:
            setattr(os, name, real[name])


def save(run: Path, step: int, world: World) -> None:
    saver = saving.Saver(run, world, keep=1)
    saver.save(step, tensors(step), {"step": step}, {"config.yaml": b"a: 1\n", "tokenizer.json": b"{}"})
    saver.wait()


def ranks(size: int, store: Path, function: Callable[[World], None]) -> list[int]:
    """Forks processes in a group of their own; returns their exit codes. This process must not have run operators."""
    store.unlink(missing_ok=True)
    children = []
    for rank in range(size):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            torch.set_num_threads(1)
            sys.stderr = open(store.with_name(f"said-{rank}"), "w", buffering=1)  # noqa: SIM115 (until the end)
            if size > 1:
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
            function(World(rank, size, torch.device("cpu")))
            code = 0
        except UserError as error:
            store.with_name(f"error-{rank}").write_text(str(error))
            store.with_name(f"trace-{rank}").write_text(str(error))
            code = 2
        except BaseException:  # noqa: BLE001 (a process ends here)
            store.with_name(f"trace-{rank}").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def loaded(run: Path, allowed: Sequence[int | None]) -> int | None:
    """The step that the loader gives, which must be allowed and bit by bit what was saved; None if it gives none."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        checkpoint.lock(run).close()
        found = checkpoint.newest(run)
    assert "falling back" not in said.getvalue(), said.getvalue()
    if found is None:
        assert None in allowed, "nothing is left"
        return None
    step = int(found.name.removeprefix("step-"))
    assert step in allowed and checkpoint.read_state(found) == {"step": step}, found
    expected = tensors(step)
    read = {name: torch.full_like(tensor, float("nan")) for name, tensor in expected.items()}
    checkpoint.load_tensors_(found, read, checkpoint.ALONE)
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items()), found
    return step


class Trials:
    """Runs trials in copies of a folder that has, or has not, a checkpoint."""

    def __init__(self, folder: Path, size: int, first: bool) -> None:
        self.folder, self.size, self.run = folder, size, folder / "run"
        self.allowed: Sequence[int | None] = (None, STEPS[1]) if first else STEPS
        self.store = folder / "store"
        self.tally: Counter[str] = Counter()
        self.failures: list[str] = []
        before = folder / "before"
        before.mkdir(parents=True, exist_ok=True)
        if not first:
            assert ranks(size, self.store, lambda world: save(before, STEPS[0], world)) == [0] * size

    def save(self, hook: Callable[..., Any] | None = None, victim: int = 0) -> list[int]:
        """Exit codes of the processes of one save; the operations of the victim, or of all (-1), go through the hook."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.folder / "before", self.run)

        def work(world: World) -> None:
            with shim(hook) if hook and victim in (-1, world.rank) else contextlib.nullcontext():
                save(self.run, STEPS[1], world)

        return ranks(self.size, self.store, work)

    def check(
        self, what: str, then: Callable[[], None] = lambda: None, allowed: Sequence[int | None] | None = None
    ) -> None:
        """What the loader gives now; in a process of its own, for this one must stay without operators."""
        if (self.folder / "said-0").exists():
            (self.folder / "said-0").rename(self.folder / "said-0-before")  # this process says something, too

        def work(world: World) -> None:
            then()
            step = loaded(self.run, self.allowed if allowed is None else allowed)
            (self.folder / "found").write_text("none" if step is None else "new" if step == STEPS[1] else "previous")

        for path in self.folder.glob("trace-0"):
            path.unlink()
        if ranks(1, self.store, work) == [0]:
            self.tally[(self.folder / "found").read_text()] += 1
        else:
            self.failures.append(f"{what}: {(self.folder / 'trace-0').read_text()}")


def kills(trials: Trials, seed: int) -> None:
    for victim in range(trials.size):
        for number in range(1, 10_000):
            for torn in (False, True):
                if torn and (trials.folder / "operation").read_text() != "write":
                    continue
                seen = 0

                def hook(name: str, where: list[Any], real: Callable[[], Any], number=number, torn=torn) -> Any:
                    nonlocal seen
                    seen += 1
                    if seen == number:
                        (trials.folder / "operation").write_text(name)
                        if torn:
                            with open(where[0], "ab") as file:
                                file.write(where[1][: len(where[1]) // 2])
                        os._exit(9)
                    return real()

                codes = trials.save(hook, victim)
                if codes[victim] == 0:
                    assert set(codes) == {0}, codes
                    break
                assert codes[victim] == 9 and set(codes) <= {9, 1, 2}, codes
                trials.check(f"process {victim} killed at operation {number}")
            if codes[victim] == 0:
                trials.tally[f"operations of process {victim}"] = number - 1
                break


def errors(trials: Trials, seed: int) -> None:
    failed = trials.folder / "failed"
    for victim in range(trials.size):
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            for number in range(1, 10_000):
                seen = 0

                def hook(name: str, where: list[Any], real: Callable[[], Any], number=number, code=code) -> Any:
                    nonlocal seen
                    seen += 1
                    if seen >= number and name not in ("unlink", "rmdir"):  # a full disk can be made room on
                        failed.touch()
                        raise OSError(code, os.strerror(code))
                    return real()

                failed.unlink(missing_ok=True)
                codes = trials.save(hook, victim)
                if not failed.exists():
                    assert set(codes) == {0}, codes
                    break

                def told(number=number, code=code) -> None:
                    for rank in range(trials.size):
                        message = (trials.folder / f"error-{rank}").read_text()
                        assert os.strerror(code) in message and str(trials.run) in message, message
                        assert "bytes" in message, message
                    assert not list(trials.run.glob("checkpoints/.saving-*")), "a part was left"

                def warned(code=code) -> None:
                    said = (trials.folder / "said-0-before").read_text()
                    committed = trials.run / "checkpoints" / f"step-{STEPS[1]}"
                    assert f": {os.strerror(code)}; the checkpoint {committed} is committed, but" in said, said
                    assert said.startswith(f"warning: {trials.folder}"), said

                what = f"{os.strerror(code)} from operation {number} of process {victim} on"
                if codes == [2] * trials.size:
                    trials.check(what, told)
                elif codes == [0] * trials.size:
                    trials.check(what, warned, allowed=STEPS[1:])
                    trials.tally["warnings"] += 1
                else:
                    trials.failures.append(f"operation {number}: exit codes {codes}")


def power(trials: Trials, seed: int) -> None:
    log = trials.folder / "log"
    log.unlink(missing_ok=True)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    append = os.write

    def hook(name: str, where: list[Any], real: Callable[[], Any]) -> Any:
        result = real()
        paths = [os.path.relpath(path, trials.run) for path in where if isinstance(path, str)]
        data = base64.b64encode(where[-1][:result]).decode() if name == "write" else ""
        append(out, json.dumps([name, paths, data]).encode() + b"\n")
        return result

    assert set(trials.save(hook, -1)) == {0}
    operations = [json.loads(line) for line in log.read_text().splitlines()]
    randomness = random.Random(seed)
    seen = set()
    for count in range(len(operations) + 1):
        history = History(trials.folder / "before", operations[:count])
        for names in ("lost", "kept", "some"):
            for contents in ("cut", "zeros", "kept"):
                if count == len(operations):
                    trials.allowed = STEPS[1:]  # the save has returned
                state = history.state(names, contents, randomness)
                key = (tuple(trials.allowed), *((path, hash(data)) for path, data in sorted(state.items())))
                trials.tally["states"] += 1
                if key in seen:
                    continue
                seen.add(key)
                shutil.rmtree(trials.run, ignore_errors=True)
                trials.run.mkdir()
                for path, data in state.items():
                    if data is None:
                        (trials.run / path).mkdir()
                    else:
                        (trials.run / path).write_bytes(data)
                trials.check(f"{count} operations, names {names}, contents {contents}")
    trials.tally["operations"] = len(operations)


class History:
    """What a disk may hold after a loss of power: a name in a folder is certain once the folder is synced, contents once
    the file is. Files and folders are numbers, so that what happened in a folder does not depend on its own name."""

    ROOT = 0

    def __init__(self, before: Path, operations: list[Any]) -> None:
        self.start: dict[int, dict[str, int]] = {self.ROOT: {}}
        self.written: dict[int, bytes] = {}
        self.synced: dict[int, bytes] = {}
        self.pending: list[tuple[int, str, int | None]] = []  # (folder, name, what it is now, or None), not certain
        self.certain: list[tuple[int, str, int | None]] = []
        self.next = 1
        for path in sorted(before.rglob("*")):
            parts = path.relative_to(before).parts
            node = self._new(path.read_bytes() if path.is_file() else None)
            self.start[self._find(self.start, parts[:-1])][parts[-1]] = node
        self.now = {folder: dict(names) for folder, names in self.start.items()}
        for name, paths, data in operations:
            self._apply(name, [Path(path).parts for path in paths], base64.b64decode(data))

    def _new(self, content: bytes | None) -> int:
        """A file that is certain, or a folder."""
        node, self.next = self.next, self.next + 1
        if content is None:
            self.start[node] = {}
        else:
            self.written[node] = self.synced[node] = content
        return node

    def _find(self, folders: dict[int, dict[str, int]], parts: tuple[str, ...]) -> int:
        node = self.ROOT
        for part in parts:
            node = folders[node][part]
        return node

    def _name(self, parts: tuple[str, ...], node: int | None) -> None:
        folder = self._find(self.now, parts[:-1])
        self.pending.append((folder, parts[-1], node))
        put(self.now, *self.pending[-1])

    def _apply(self, name: str, paths: list[tuple[str, ...]], data: bytes) -> None:
        parts = paths[0]
        if parts[:1] == ("..",):
            return  # outside, and there already
        if name == "write":
            if parts[-1] not in self.now[self._find(self.now, parts[:-1])]:
                self._name(parts, self._new(b""))
            self.written[self._find(self.now, parts)] += data
        elif name == "fsync":
            node = self._find(self.now, parts)
            if node in self.written:
                self.synced[node] = self.written[node]
            self.certain += [change for change in self.pending if change[0] == node]
            self.pending = [change for change in self.pending if change[0] != node]
        elif name == "mkdir":
            if parts[-1] not in self.now[self._find(self.now, parts[:-1])]:
                node = self._new(None)
                self.now[node] = {}
                self._name(parts, node)
        elif name in ("rename", "replace"):  # both names at once: in one folder, as all of ours
            assert paths[1][:-1] == parts[:-1]
            node = self._find(self.now, parts)
            self._name(paths[1], node)
            self._name(parts, None)
        else:
            self._name(parts, None)

    def state(self, names: str, contents: str, randomness: random.Random) -> dict[str, bytes | None]:
        """{path: content, None of a folder}, a folder before what is in it."""
        folders = {folder: dict(entries) for folder, entries in self.start.items()}
        left = {}  # of each folder's uncertain changes, which the disk may have in their order: how many
        for folder in sorted({change[0] for change in self.pending}):
            count = sum(change[0] == folder for change in self.pending)
            left[folder] = {"lost": 0, "kept": count, "some": randomness.randint(0, count)}[names]
        for change in self.certain:
            put(folders, *change)
        for change in self.pending:
            left[change[0]] -= 1
            if left[change[0]] >= 0:
                put(folders, *change)
        result: dict[str, bytes | None] = {}
        todo = [("", self.ROOT)]
        while todo:
            place, folder = todo.pop()
            for name, node in folders[folder].items():
                path = os.path.join(place, name)
                if node not in self.written:
                    result[path] = None
                    todo.append((path, node))
                    continue
                certain, written = self.synced[node], self.written[node]
                rest = {"cut": b"", "zeros": bytes(len(written) - len(certain)), "kept": written[len(certain) :]}
                result[path] = certain + rest[contents]
        return result


def put(folders: dict[int, dict[str, int]], folder: int, name: str, node: int | None) -> None:
    if node is None:
        folders[folder].pop(name, None)
    else:
        folders[folder][name] = node


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["kills", "power", "errors"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--first", action="store_true", help="there is no checkpoint yet")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    trials = Trials(arguments.folder.resolve(), arguments.world, arguments.first)
    {"kills": kills, "power": power, "errors": errors}[arguments.what](trials, arguments.seed)
    for failure in trials.failures[:10]:
        print(failure)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(trials.tally.items()))
    print(f"{arguments.what}, world {arguments.world}: {counts}, {len(trials.failures)} failed")
    return 1 if trials.failures else 0


if __name__ == "__main__":
    sys.exit(main())
