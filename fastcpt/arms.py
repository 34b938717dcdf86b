"""Runs as their files tell them: `config.yaml`, `metrics.jsonl` and the newest checkpoint's `state.json`.

An arm is a run in comparison with others. What is missing, null or torn becomes a gap and a remark; what is no run, or
was changed by hand, raises UserError. Needs neither torch nor the run's data.
"""

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastcpt import UserError
from fastcpt.pretraining import Pretraining


@dataclass(frozen=True)
class Arm:
    """A run as its files tell it. state: of its newest checkpoint; planned: its last step, where the files say so."""

    name: str
    folder: Path
    config: dict[str, Any]
    state: dict[str, Any] | None
    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    planned: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def scratch(self) -> bool:
        return self.config["init"]["from"] == "scratch"

    @property
    def last(self) -> dict[str, Any]:
        return max((*self.training[-1:], *self.evaluations[-1:]), key=lambda line: line["step"])

    @property
    def first(self) -> int:
        """The step it started after."""
        return self.state["plan"]["first"] if self.state else self.evaluations[0]["step"] if self.evaluations else 0

    @property
    def starts(self) -> list[int]:
        """Indexes of each process's first training line, where the clock begins anew: that interval has compilation."""
        clock = column(self.training, "seconds")
        return [i for i in range(len(clock)) if i == 0 or clock[i] < clock[i - 1]]

    @property
    def seconds(self) -> float:
        """Wall time of all its processes, each up to its last training line."""
        clock = column(self.training, "seconds")
        return sum(clock[i - 1] for i in [*self.starts[1:], len(clock)]) if clock else math.nan

    @property
    def throughput(self) -> float:
        """Median tokens a second of the intervals without compilation."""
        rates, starts = column(self.training, "tokens_per_second"), set(self.starts)
        steady = finite([rate for i, rate in enumerate(rates) if i not in starts])
        return statistics.median(steady) if steady else math.nan

    @property
    def plane(self) -> list[tuple[float, float]]:
        """(forgetting, adaptation) of each evaluation that has both."""
        points = zip(column(self.evaluations, "forgetting"), column(self.evaluations, "adaptation"))
        return [point for point in points if all(map(math.isfinite, point))]

    def entries(self, name: str) -> list[tuple[int, dict[str, Any]]]:
        """(tokens, results) of each evaluation of a validation set."""
        return [(line["tokens"], line["eval"][name]) for line in self.evaluations if name in line["eval"]]


def number(value: Any) -> float:
    """A file's number; null, for what was not finite, and what is missing are not-a-number: a gap in a curve."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def column(lines: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [number(line.get(key)) for line in lines]


def printable(text: str) -> str:
    """Names of folders may hold bytes that are no text, and XML knows no control characters."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def read_arms(runs: Sequence[str]) -> list[Arm]:
    """The runs, in the order given, under names that tell them apart. Raises UserError for a folder that is no run."""
    if not runs:
        raise UserError("runs-missing", "there is nothing to report on; name at least one run's folder")
    folders = [Path(os.path.abspath(run)) for run in runs]
    for i, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:i]]:
            raise UserError("run-twice", f"{runs[i]}: this run is given twice; name each once")
    depths = [1] * len(folders)
    while True:
        names = [printable("/".join(folder.parts[-depth:])) for folder, depth in zip(folders, depths)]
        longer = [depth + (names.count(name) > 1) for name, depth in zip(names, depths)]
        if longer == depths or max(longer) > max(len(folder.parts) for folder in folders):
            return [_read_arm(name, folder) for name, folder in zip(names, folders)]
        depths = longer


def _read_arm(name: str, folder: Path) -> Arm:
    import yaml

    for file in ("metrics.jsonl", "config.yaml"):
        if not (folder / file).is_file():
            raise UserError(
                "not-a-run", f"{folder}: no run, it has no {file}; name a folder that was a run's run.output"
            )
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        steps = -(-config["train"]["tokens"] // config["train"]["batch_tokens"])
        branch = config["init"]["from"] != "scratch" and config["init"].get("branch", False)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, ZeroDivisionError):
        raise UserError(
            "run-config-damaged", f"{folder / 'config.yaml'}: not a run's configuration; put back the one it wrote"
        ) from None
    lines, notes = _read_lines(folder / "metrics.jsonl")
    evaluations = [line for line in lines if "eval" in line]
    state = _read_state(folder, notes)
    planned: int | None = steps
    if state is not None:
        planned = state["plan"]["first"] + state["plan"]["steps"]
    elif branch:  # its steps go on from a checkpoint's, which only its first evaluation tells
        planned = evaluations[0]["step"] + steps if evaluations else None
    training = [line for line in lines if "loss" in line]
    arm = Arm(name, folder, config, state, training, evaluations, planned, notes)
    notes += _remarks(arm)
    alarms = [line for line in lines if line.get("event", {}).get("kind") == "alarm"]
    if alarms:
        first = f"at step {alarms[0]['step']:,}: {alarms[0]['event']['text']}"
        notes.append(f"{len(alarms):,} alarms, the first {first}" if len(alarms) > 1 else f"an alarm {first}")
    return arm


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(the lines, remarks). A kill can tear the last line, and nothing but the last."""
    pieces = [(n, piece) for n, piece in enumerate(path.read_bytes().split(b"\n"), 1) if piece.strip()]
    lines: list[dict[str, Any]] = []
    notes = []
    for n, piece in pieces:
        try:
            line = json.loads(piece)
            line["step"].bit_length(), line["tokens"].bit_length()  # both are integers
            if line.get("loss") == 0:
                line["loss"] = None  # the mean over no token: every step of the interval was skipped
            if "eval" in line:
                line["eval"] = {printable(name): dict(entry) for name, entry in line["eval"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            if n != pieces[-1][0]:
                raise UserError("metrics-damaged", f"{path}, line {n}: not a line of metrics; remove it") from None
            notes.append(f"the last line of metrics.jsonl, line {n}, is torn and left out")
        else:
            lines.append(line)
    if not lines:
        raise UserError(
            "metrics-empty", f"{path}: no whole line in it; let the run reach its first evaluation or log line"
        )
    return lines, notes


def _read_state(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    """The newest checkpoint's state, or None and a remark why."""
    steps = [int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    if not steps:
        notes.append("there is no checkpoint in its folder")
        return None
    path = folder / "checkpoints" / f"step-{max(steps)}" / "state.json"
    try:
        state = json.loads(path.read_bytes())
        int(state["plan"]["first"] + state["plan"]["steps"])
        return state
    except (OSError, ValueError, KeyError, TypeError):
        notes.append(f"{path.parent.name}/state.json, of its newest checkpoint, cannot be read")
        return None


def _remarks(arm: Arm) -> list[str]:
    """What a reader of the figures should know about the run."""
    notes, step = [], arm.last["step"]
    if arm.planned is not None and step < arm.planned:
        notes.append(f"unfinished: at step {step:,} of {arm.planned:,}")
    if not arm.training:
        notes.append("no training line yet")
    elif len(arm.starts) > 1:
        notes.append(f"started {len(arm.starts)} times; its wall time is the sum")
    if not arm.evaluations:
        notes.append("no evaluation yet" if arm.config.get("data", {}).get("val") else "no validation sets")
    elif len(arm.evaluations) == 1:
        notes.append(f"only one evaluation, at step {arm.evaluations[0]['step']:,}")
    if skipped := max([0.0, *finite(column(arm.training, "skipped"))]):
        notes.append(f"{skipped:,.0f} steps skipped, whose gradients were not finite")
    return notes


def set_names(arms: Sequence[Arm]) -> dict[str, str]:
    """{validation set: its role, or roles where arms differ}, in the order of their first evaluation."""
    roles: dict[str, dict[str, None]] = {}
    for arm in arms:
        for line in arm.evaluations:
            for name, entry in line["eval"].items():
                roles.setdefault(name, {})[printable(str(entry.get("role", "other")))] = None
    return {name: "/".join(each) for name, each in roles.items()}


def comparable(arms: Sequence[Arm], name: str) -> bool:
    """Whether the arms measured a validation set on the same tokens, as far as their files tell."""
    measured = [arm for arm in arms if arm.entries(name)]
    sizes = {entry.get("tokens") for arm in measured for _, entry in arm.entries(name)}
    data = [(arm.state or {}).get("data", {}).get("fingerprints", {}).get("val", {}) for arm in measured]
    return len(sizes) <= 1 and len({prints[name] for prints in data if name in prints}) <= 1


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 0.001, ...}; the entries of a list of named things go by their names, which are a value too."""
    if isinstance(value, list) and value and all(isinstance(each, dict) and "name" in each for each in value):
        rest = {each["name"]: {key: inner for key, inner in each.items() if key != "name"} for each in value}
        return {prefix: ", ".join(map(str, rest))} | flat(rest, prefix)
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf for name, inner in value.items() for key, leaf in flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }


def differences(arms: Sequence[Arm]) -> dict[str, list[str]]:
    """{setting: its value in each arm, "–" where there is none} of those that differ, but for run.output."""
    configs = [flat(arm.config) for arm in arms]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    sections = list(dict.fromkeys(key.partition(".")[0] for key in keys))

    def text(value: Any) -> str:
        return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))

    return {
        key: [text(config[key]) if key in config else "–" for config in configs]
        for key in sorted(keys, key=lambda key: sections.index(key.partition(".")[0]))
        if key != "run.output" and any(config.get(key, ...) != configs[0].get(key, ...) for config in configs)
    }


def origin(arm: Arm) -> str:
    """Where the arm started and by what schedule, in words."""
    init, plan = arm.config["init"], (arm.state or {}).get("plan", {})
    if arm.scratch:
        said = "From scratch."
    elif init.get("branch"):
        at = f" at step {plan['first']:,}" if plan else ""
        said = f"A branch of {init['from']}{at}; moments and data position kept."
    else:
        moments = "kept" if init.get("optimizer") == "keep" else "reset"
        said = f"Continues {init['from']}; Adam's moments {moments}, data from its start."
    if {"kind", "warmup", "peak"} <= plan.keys():
        said += f" Schedule: {plan['kind']}, {plan['steps']:,} steps, {plan['warmup']:,} of warm-up, peak {plan['peak']:.3g}."
    if not arm.scratch and (known := (arm.state or {}).get("history", {}).get("pretraining")):
        text = Pretraining(**known).text
        said += f" {text[0].upper()}{text[1:]}."
    return printable(said)
