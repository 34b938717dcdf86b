"""R6: what a resume must restore. One base of grid.yaml, uninterrupted; stopped at its middle and resumed; and resumed with one
thing left out: the schedule's place, Adam's moments, or the data position.

    python benchmarks/experiments/resume.py FOLDER          FOLDER holds shards/ (corpus.py)

Writes benchmarks/results/experiments_resume.json, of which claims.py makes the page's entry.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from fastcpt import checkpoint, grid, schedules
from fastcpt.config import Config
from fastcpt.data import batches
from fastcpt.state import State, named_tensors
from fastcpt.train import evaluate, setup, train, train_step

HERE = Path(__file__).parent
OUTPUT = HERE.parent / "results" / "experiments_resume.json"


def weights(run: Path) -> dict[str, bytes]:
    newest = checkpoint.newest(run)
    assert newest is not None
    return {
        name: value.numpy().tobytes()
        for file in newest.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def lines(run: Path) -> list[dict[str, Any]]:
    """Training lines, without what a clock says."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("step", "loss", "lr", "grad_norm")} for line in found if "loss" in line]


def restart_schedule(state: State) -> None:
    left = state.plan.steps - state.step
    schedule, batch = state.config.schedule, state.config.train.batch_tokens
    state.plan = schedules.make(schedule, left * batch, batch, state.step, state.plan.peak, False)


def reset_moments(state: State) -> None:
    for name, tensor in named_tensors(state).items():
        if name.startswith("exp_avg"):
            tensor.zero_()
    state.optimizer.set_updates(0)


def reset_position(state: State) -> None:
    state.samples = 0


OTHERS: dict[str, Callable[[State], None]] = {
    "the schedule begins anew": restart_schedule,
    "Adam's moments are reset": reset_moments,
    "the data begin anew": reset_position,
}


def resumed(config: Config, change: Callable[[State], None]) -> State:
    """Trains to the end from the run's newest checkpoint, after a change of what it restored."""
    state = setup(config)
    change(state)
    sequences = config.train.batch_tokens // config.data.seq_len
    for windows in batches(state.mixture, state.samples, state.last_step - state.step, sequences, 0, 1):
        train_step(state, windows)
    return state


def main(folder: Path) -> None:
    os.chdir(folder)
    shutil.rmtree("resume", ignore_errors=True)
    base = yaml.safe_load((HERE / "grid.yaml").read_text())["base"]
    base["run"] |= {"log_every": 1, "eval_every": 1600, "output": "resume/whole"}
    base["train"] |= {"tokens": 3_276_800, "seed": 0}
    config = grid.parse_sections(base)

    def at(name: str, stop: int = 0) -> Config:
        return replace(config, run=replace(config.run, output=f"resume/{name}", stop_at=stop))

    whole = train(at("whole"))
    middle = whole.last_step // 2
    train(at("half", middle))
    for name in ("exact", *OTHERS):
        shutil.copytree("resume/half", f"resume/{name}")
    train(at("exact"))
    ends = {name: weights(Path("resume", name)) for name in ("whole", "exact")}
    logs = {name: lines(Path("resume", name)) for name in ("whole", "exact")}
    start = whole.start_losses

    def loss(state: State) -> float:
        return evaluate(state)["eval"]["a"]["loss"]

    others = {}
    for name, change in OTHERS.items():
        state = resumed(at(name), change)
        state.start_losses = start
        tensors = {key: value.detach().numpy().tobytes() for key, value in named_tensors(state).items()}
        others[name] = {"loss": loss(state), "differs": tensors != ends["whole"]}
    result = {
        "tokens": int(config.train.tokens), "stopped_at": middle, "loss": loss(whole),
        "exact": {
            "weights and moments": ends["whole"] == ends["exact"],
            "rates, losses and gradient norms of all steps": logs["whole"] == logs["exact"],
        },
        "others": others,
    }  # fmt: skip
    OUTPUT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
