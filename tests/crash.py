"""Kills training at random moments and starts it again, until it is complete; then compares it with the run that was
never stopped: weights, moments, state and metrics (timing aside), bit for bit.

    python tests/crash.py --trials 20 --world 1 --seed 0 FOLDER        FOLDER holds config.yaml (see test_resume.py)

The ranks are forked from this process, which has imported torch but run no parallel operator, so that a kill costs a
fraction of a second. In every second trial the kill waits for a save to be under way. Prints one line a trial and a
tally; exits 1 if a trial differs.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.utils.tensorboard
from safetensors import safe_open

from fastcpt import train
from fastcpt.metrics import TIMING_FIELDS


def start(folder: Path, output: Path, world: int) -> list[int]:
    """Forks the ranks of one attempt; returns their process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if world > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = 1
            try:
                torch.set_num_threads(1)
                code = train.main(["--config", str(folder / "config.yaml"), "--run.output", str(output)])
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return children


def wait(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def saving(output: Path) -> bool:
    names = os.listdir(output / "checkpoints") if (output / "checkpoints").exists() else []
    return any(name.startswith((".saving-", ".removing-")) for name in names)


def attempt(
    folder: Path, output: Path, world: int, randomness: random.Random, inside_save: bool, longest: float
) -> str:
    """One start that is killed at a random moment unless it finishes first: "done", "killed" or "killed in a save"."""
    children = start(folder, output, world)
    deadline = time.monotonic() + randomness.uniform(0.1, longest)
    victims = children if randomness.random() < 0.5 else [randomness.choice(children)]
    while time.monotonic() < deadline or (inside_save and not saving(output)):
        done, status = os.waitpid(children[0], os.WNOHANG)
        if done:
            codes = [os.waitstatus_to_exitcode(status), *wait(children[1:])]
            assert set(codes) == {0}, f"exit codes {codes}: see {folder}/log-*"
            return "done"
        time.sleep(0.0002)
    time.sleep(randomness.uniform(0, 0.003) if inside_save else 0)
    in_save = saving(output)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    wait(children)
    return "killed in a save" if in_save else "killed"


def digest(output: Path) -> dict[str, str]:
    """Hashes of the last checkpoint's tensors, of its state, and of the metrics without their timing fields."""
    last = max((output / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    tensors = hashlib.sha256()
    values = {}
    for path in last.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                values[name] = file.get_tensor(name).tobytes()
    for name in sorted(values):
        tensors.update(name.encode() + values[name])
    state = json.loads((last / "state.json").read_text())
    state["config"]["run"].pop("output")
    lines = []
    for line in (output / "metrics.jsonl").read_text().splitlines():
        lines.append({key: value for key, value in json.loads(line).items() if key not in TIMING_FIELDS})
    return {
        "step": last.name,
        "tensors": tensors.hexdigest(),
        "state": hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest(),
        "metrics": hashlib.sha256(json.dumps(lines).encode()).hexdigest(),
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, randomness = arguments.folder, random.Random(arguments.seed)
    reference = folder / "reference"
    started = time.monotonic()
    assert set(wait(start(folder, reference, arguments.world))) == {0}, f"the reference run failed: see {folder}/log-*"
    length = time.monotonic() - started
    expected = digest(reference)
    kills = inside = trials = different = 0
    while kills < arguments.kills:
        output = folder / f"trial-{trials}"
        history = []
        while (outcome := attempt(folder, output, arguments.world, randomness, kills % 2 == 0, length)) != "done":
            kills += 1
            inside += outcome == "killed in a save"
            history.append(outcome)
        same = digest(output) == expected
        different += not same
        print(
            f"trial {trials}: {len(history)} kills ({', '.join(history)}): {'same' if same else f'DIFFERENT {digest(output)}'}"
        )
        trials += 1
        shutil.rmtree(output)
    print(
        f"seed {arguments.seed}, world {arguments.world}: {kills} kills, {inside} inside a save, {trials} trials, {different} different"
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
