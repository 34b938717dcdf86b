"""A sweep's file: arms of one experiment, each with every seed, as the configurations of their runs.

    base: base.yaml                # what all arms share: a configuration beside this file, a preset, or its sections here
    output: sweeps/rates           # run folders: output/ARM/seed-S
    seeds: [0, 1, 2]               # train.seed of each: arms of one seed see the same text in the same order
    set: {run.eval_every: 100}     # of all arms
    arms:
      base: {set: {train.tokens: 5M}}
      new:
        set: {init.from: "{base}"}             # the run of that arm with the same seed; "{base}@500": its step 500
        grid:                                  # one arm for each combination, here new-0.001-0, new-0.001-0.01 ...
          optim.lr: [1e-3, 2e-3]
          schedule.warmup: {none: 0, one: 0.01}    # or named: new-0.001-none

    figures: {Rates: [base, "new-*-one"]}      # of `fastcpt report FILE`: arms together in one; else each arm with its grid

Settings have their dotted names; a list, such as data.train, is one setting. `{seed}` in text is the seed.
"""

import fnmatch
import itertools
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcpt import UserError, yaml_files
from fastcpt.config import SECTIONS, Config, parse, to_yaml

KEYS = {"base", "output", "seeds", "set", "arms", "figures"}
ARM_KEYS = {"set", "grid", "seeds"}
REFERENCE = re.compile(r"\{([^{}]*)\}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=%-]*")


@dataclass(frozen=True)
class Job:
    """One run of a sweep. needs: run folders that must be complete before it starts; file: its configuration."""

    arm: str
    seed: int
    config: Config
    file: Path
    needs: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        return Path(self.config.run.output)

    @property
    def name(self) -> str:
        return f"{self.arm}/seed-{self.seed}"


@dataclass(frozen=True)
class Grid:
    """A sweep's file, read. jobs: each after those it needs."""

    output: Path
    jobs: list[Job]
    figures: dict[str, list[str]]


def _wrong(file: Path, message: str) -> UserError:
    return UserError("sweep-file-wrong", f"{file}: {message}")


def _mapping(file: Path, value: Any, what: str, known: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _wrong(file, f"{what} is {value!r}, not a mapping of names")
    if known is not None and (unknown := sorted(value.keys() - known)):
        raise _wrong(file, f"{what} has {unknown[0]!r}; known are {', '.join(sorted(known))}")
    return value


def _load(file: Path) -> dict[str, Any]:
    import yaml

    if not file.is_file():
        raise UserError("sweep-file-missing", f"{file}: there is no such file")
    try:
        return _mapping(file, yaml.safe_load(file.read_text(encoding="utf-8")), "the file")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _wrong(file, f"not YAML: {' '.join(str(error).split())}") from None


def _content(file: Path, *needed: str) -> dict[str, Any]:
    content = _mapping(file, _load(file), "the file", KEYS)
    for key in needed:
        if not content.get(key):
            raise _wrong(file, f"{key!r} is missing")
    _mapping(file, content["arms"], "arms")
    return content


def expanded(file: Path, arms: dict[str, Any]) -> dict[str, tuple[dict[str, Any], list[int] | None]]:
    """{arm: (its settings, its seeds or None)}, with the grids multiplied out."""
    out: dict[str, tuple[dict[str, Any], list[int] | None]] = {}
    for name, arm in arms.items():
        arm = _mapping(file, arm or {}, f"arm {name}", ARM_KEYS)
        settings = _mapping(file, arm.get("set") or {}, f"set of arm {name}")
        axes = []
        for key, values in _mapping(file, arm.get("grid") or {}, f"grid of arm {name}").items():
            if isinstance(values, list):
                values = {str(value): value for value in values}
            elif isinstance(values, dict):  # YAML reads names such as 10 as numbers
                values = {str(label): value for label, value in values.items()}
            axes.append(
                [(label, key, value) for label, value in _mapping(file, values, f"grid {key} of {name}").items()]
            )
        for point in itertools.product(*axes):
            label = "-".join([name, *(label for label, _, _ in point)])
            if not NAME.fullmatch(label):
                raise _wrong(
                    file, f"arm {label!r} names a folder: letters, digits and . _ + = % - alone; name its values"
                )
            if label in out:
                raise _wrong(file, f"there are two arms {label}; name them, or the values of their grids, differently")
            out[label] = (settings | {key: value for _, key, value in point}, arm.get("seeds"))
    return out


def _figures(file: Path, content: dict[str, Any], arms: Iterable[str]) -> dict[str, list[str]]:
    """{title: arms, in the order of their patterns}."""
    asked = _mapping(file, content.get("figures") or {name: [name, f"{name}-*"] for name in content["arms"]}, "figures")
    figures: dict[str, list[str]] = {}
    for title, patterns in asked.items():
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise _wrong(file, f"figure {title} is {patterns!r}, not a list of arms")
        found = {arm: None for pattern in patterns for arm in fnmatch.filter(arms, pattern)}
        if not found:
            raise _wrong(file, f"figure {title}: no arm is {' or '.join(patterns)}")
        figures[title] = list(found)
    return figures


def _nested(file: Path, settings: dict[str, Any], into: dict[str, Any]) -> dict[str, Any]:
    """Dotted settings written into sections."""
    sections = {key: dict(value) for key, value in into.items()}
    for key, value in settings.items():
        section, dot, rest = key.partition(".")
        if section not in SECTIONS or not dot:
            raise _wrong(file, f"{key!r} is no setting; write section.field, sections are {', '.join(SECTIONS)}")
        sections.setdefault(section, {})[rest] = value
    return sections


def outline(path: str | Path) -> tuple[Path, dict[str, list[str]]]:
    """(output, figures) of a sweep's file, without its configurations. Raises UserError."""
    file = Path(path)
    content = _content(file, "output", "arms")
    return Path(str(content["output"])), _figures(file, content, expanded(file, content["arms"]))


def parse_sections(sections: dict[str, Any]) -> Config:
    """A configuration of plain values, without a file. Raises UserError."""
    import yaml

    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".yaml") as file:
        yaml.safe_dump(sections, file)
        file.flush()
        try:
            return parse(["--config", file.name])
        except UserError as error:
            raise UserError(error.id, str(error).replace(f"{file.name}: ", "").replace(f"{file.name} ", "")) from None


def read(path: str | Path) -> Grid:
    """Raises UserError for what no run could be made of, before any starts. Writes each run's configuration."""
    file = Path(path)
    content = _content(file, "base", "output", "arms")
    base = content["base"]
    if isinstance(base, str):
        beside = file.parent / base
        base = _load(beside if beside.is_file() else Path(yaml_files.find(base)))
    base = {
        name: _mapping(file, value or {}, f"{name} of base") for name, value in _mapping(file, base, "base").items()
    }
    output, common = Path(str(content["output"])), _mapping(file, content.get("set") or {}, "set")
    arms = expanded(file, content["arms"])
    figures = _figures(file, content, arms)
    usual = content.get("seeds", [0])
    jobs: dict[tuple[str, int], Job] = {}

    def seeds_of(arm: str) -> list[int]:
        seeds = usual if arms[arm][1] is None else arms[arm][1]
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
            raise _wrong(file, f"seeds {seeds!r} are not a list of whole numbers from 0 on")
        return seeds

    def resolve(value: Any, arm: str, seed: int, needs: dict[str, Path], under: tuple[str, ...]) -> Any:
        if isinstance(value, list):
            return [resolve(each, arm, seed, needs, under) for each in value]
        if isinstance(value, dict):
            return {key: resolve(each, arm, seed, needs, under) for key, each in value.items()}
        if not isinstance(value, str):
            return value
        step = ""

        def folder(match: re.Match[str]) -> str:
            if match[1] == "seed":
                return str(seed)
            if match[1] not in arms or seed not in seeds_of(match[1]):
                raise _wrong(file, f"arm {arm}, seed {seed}: {{{match[1]}}} is no arm with this seed")
            needs[match[1]] = (other := add(match[1], seed, under)).folder
            return str(other.folder)

        text = REFERENCE.sub(folder, value)
        if text != value and (found := re.fullmatch(r"(.*)@([0-9]+)", text)):
            text, step = found[1], f"/checkpoints/step-{found[2]}"
        return text + step

    def add(arm: str, seed: int, under: tuple[str, ...]) -> Job:
        if (arm, seed) in jobs:
            return jobs[arm, seed]
        if arm in under:
            raise _wrong(file, f"arm {arm} starts from itself, by way of {' and '.join(under)}")
        needs: dict[str, Path] = {}
        settings = resolve(common | arms[arm][0], arm, seed, needs, (*under, arm))
        folder = output / arm / f"seed-{seed}"
        sections = _nested(file, settings | {"train.seed": seed, "run.output": str(folder)}, base)
        try:
            config = parse_sections(sections)
        except UserError as error:
            raise UserError(error.id, f"{file}: arm {arm}: {error}") from None
        written = output / "configs" / f"{arm}-seed-{seed}.yaml"
        jobs[arm, seed] = Job(arm, seed, config, written, tuple(needs.values()))
        return jobs[arm, seed]

    for arm in arms:
        for seed in seeds_of(arm):
            add(arm, seed, ())
    for job in jobs.values():
        job.file.parent.mkdir(parents=True, exist_ok=True)
        job.file.write_text(to_yaml(job.config), encoding="utf-8")
    return Grid(output, list(jobs.values()), figures)
