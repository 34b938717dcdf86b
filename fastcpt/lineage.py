"""Where a run's weights, moments and data position come from, and what is refused on the way (DESIGN.md, D12).

scratch    new weights
pretrained the weights of a Hugging Face model; its history is unknown
continue   the weights of a fastcpt checkpoint, its moments if asked; data and schedule start anew
branch     weights, moments, step and data position of a checkpoint; a new schedule that starts at its rate
resume     the same run goes on: all of the above and the schedule's place, as if it had never stopped
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastcpt import UserError, checkpoint, hf, rates, replay
from fastcpt.config import Config, to_dict
from fastcpt.data import Mixture, Phase, PhaseSource, parts_per_million, taken
from fastcpt.model import Architecture, resolve_architecture
from fastcpt.parallel import World
from fastcpt.phases import Span, lay_out
from fastcpt.schedules import Plan
from fastcpt.shards import ShardSet, tokenizer_fingerprint

# What may differ when a run goes on: where and how it runs and reports, not what it computes. Sets are compared by
# their content, not by their paths.
FREE = (
    "run.", "data.reader", "train.micro_batch", "train.parallel", "train.deterministic", "train.compile", "train.recompute",
    "train.kernels", "train.loss", "train.attention",
)  # fmt: skip
# Forgetting compares with the start, which was measured on this many tokens.
NOT_FREE = ("run.eval_tokens",)


# What of a checkpoint's `state.json` a run needs: to start from its weights, and to keep its position.
FOR_WEIGHTS = ("architecture", "eod_token", "history", "lr", "adam_updates", "data")
FOR_POSITION = (
    *FOR_WEIGHTS, "step", "tokens", "plan", "start_losses", "unevaluated", "interval", "skipped", "spikes", "rng",
    "config",
)  # fmt: skip


def read_state(found: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    """Raises UserError when a checkpoint, which is whole, lacks what this version needs."""
    state = checkpoint.read_state(found)
    if missing := [name for name in needed if name not in state]:
        raise UserError(
            "checkpoint-of-another-version",
            f"{found / checkpoint.STATE}: has no {missing[0]!r}: another version of fastcpt wrote it; go on with that version, "
            "or export the model there and start from the export (init.from) in a new folder",
        )
    return state


@dataclass(frozen=True)
class Origin:
    """How a run starts. path: the folder that weights are read from; state: a checkpoint's `state.json`."""

    kind: Literal["scratch", "pretrained", "continue", "branch", "resume"]
    arch: Architecture
    path: Path | None = None
    state: dict[str, Any] | None = None

    @property
    def keeps_position(self) -> bool:
        return self.kind in ("branch", "resume")


def find_origin(config: Config, world: World) -> Origin:
    """Looks for a checkpoint of this run, else for what `init.from` names. Verified before it is parsed."""
    own = checkpoint.newest(Path(config.run.output), world)
    if own is not None:
        state = read_state(own, FOR_POSITION)
        return Origin("resume", Architecture(**state["architecture"]), own, state)
    source = config.init.from_
    if source == "scratch":
        if config.init.optimizer == "keep":
            raise UserError(
                "moments-missing", "init.optimizer is keep, but a run from scratch has no moments to keep; remove it"
            )
        arch = replace(resolve_architecture(config.model, None, "scratch"), max_positions=config.data.seq_len)
        return Origin("scratch", arch)
    found = checkpoint.find(source, world)
    if found is not None:
        state = read_state(found, FOR_POSITION if config.init.branch else FOR_WEIGHTS)
        arch = resolve_architecture(config.model, Architecture(**state["architecture"]), str(found))
        return Origin("branch" if config.init.branch else "continue", _reaching(arch, config), found, state)
    folder = world.on_first(lambda: hf.resolve(source))
    for setting in ("branch", "optimizer: keep"):
        if config.init.branch if setting == "branch" else config.init.optimizer == "keep":
            raise UserError(
                "moments-missing",
                f"init.{setting} needs Adam's moments, and {source} has weights alone; start from a checkpoint",
            )
    arch = resolve_architecture(config.model, hf.read_architecture(folder), source)
    return Origin("pretrained", _reaching(arch, config), folder)


def _reaching(arch: Architecture, config: Config) -> Architecture:
    """An export says the longest sequence that the model was trained on."""
    return replace(arch, max_positions=max(arch.max_positions, config.data.seq_len))


def fingerprints(entries: Sequence[Any], sets: dict[str, ShardSet]) -> dict[str, str]:
    return {entry.name: sets[entry.name].fingerprint for entry in entries}


def check_tokenizer(config: Config, origin: Origin, sets: Sequence[ShardSet]) -> None:
    """All sets, and the model, must speak the same ids."""
    expected, owner = sets[0].manifest["tokenizer"]["fingerprint"], str(sets[0].path)
    for shard_set in sets[1:]:
        if shard_set.manifest["tokenizer"]["fingerprint"] != expected:
            raise UserError(
                "tokenizer-differs",
                f"{shard_set.path}: made with another tokenizer than {owner}; prepare both with the same one",
            )
    if origin.kind == "scratch" or config.init.force:
        return
    assert origin.path is not None
    beside = origin.path / "tokenizer.json"
    if beside.exists():
        check_made_with(beside, sets[:1], ", or say init.force: true if the ids mean the same")


def check_made_with(tokenizer: Path, sets: Sequence[ShardSet], else_: str = "") -> None:
    """Raises UserError when a set was made with another tokenizer than this file of a model."""
    for shard_set in sets:
        if shard_set.manifest["tokenizer"]["fingerprint"] != tokenizer_fingerprint(tokenizer.read_bytes()):
            raise UserError(
                "tokenizer-differs",
                f"{tokenizer}: the model's tokenizer is not the one that made {shard_set.path}; prepare the text with the "
                f"model's (--tokenizer){else_}",
            )


def check_resume(config: Config, state: dict[str, Any], data: dict[str, Any]) -> None:
    """Refuses, with the difference, to go on with a run under another configuration or on other data."""

    def flat(value: Any, prefix: str) -> dict[str, Any]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if items is None:
            return {prefix: value}
        return {
            key: leaf
            for name, inner in items
            for key, leaf in flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
        }

    before, now = flat(state["config"], ""), flat(to_dict(config), "")
    before |= flat(state["data"]["fingerprints"], "content of data")
    now |= flat(data, "content of data")
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and (key in NOT_FREE or not key.startswith(FREE))
        and not (key.startswith("data.") and key.endswith(".path"))
    ]
    if changed:
        raise UserError(
            "run-config-changed",
            f"{config.run.output}: this run is at step {state['step']} with another configuration ({'; '.join(changed)}); "
            "put it back, or start in a new folder (init.from this one, with or without init.branch)",
        )


def _outline(config: Config, origin: Origin) -> tuple[Plan, list[Span]]:
    """The learning rates and the phases of a run that does not go on with its checkpoint's."""
    if origin.kind == "branch":
        assert origin.state is not None
        return lay_out(config, origin.state["step"], origin.state["lr"])
    assert config.optim.lr is not None
    return lay_out(config, 0, config.optim.lr)


def make_plan(config: Config, origin: Origin) -> Plan:
    """The run's learning rates. A resumed run takes them from its checkpoint."""
    if origin.kind == "resume":
        assert origin.state is not None
        return Plan(**origin.state["plan"])
    return _outline(config, origin)[0]


def make_phases(config: Config, origin: Origin, sets: dict[str, ShardSet]) -> list[Phase]:
    """The mixture's phases. A branch keeps those that its checkpoint has begun, and a changed mixture becomes a new one.

    Each goes on in every set where the one before stopped: nothing is repeated or skipped.
    """
    begin, phases = 0, []
    if origin.state is not None and origin.keeps_position:
        phases = [Phase.from_dict(phase) for phase in origin.state["data"]["phases"]]
        if origin.kind == "resume":
            return phases
        begin = origin.state["data"]["samples"]
        phases = [phase for phase in phases if phase.first < begin]
    data, seed = config.data, config.train.seed
    now, read = fingerprints(data.train, sets), read_before(origin)
    batch = config.train.batch_tokens // data.seq_len
    plan, spans = _outline(config, origin)
    for span in spans:
        first, weights = begin + (span.first - plan.first) * batch, parts_per_million(list(span.weights.values()))
        start = taken(phases, first)
        known = replay.remembered(read, phases, first, data.seq_len, seed)
        sources: list[PhaseSource] = []
        for source in data.train:
            content, windows = now[source.name], sets[source.name].num_windows(data.seq_len)
            again, done = None, start.get(content, 0)
            if source.replay:
                again, done = replay.of(source, content, windows, known, data.seq_len, seed)
            if source.name in span.weights:
                sources.append(PhaseSource(source.name, content, weights[len(sources)], done, again))
        shares = [(source.key, source.weight) for source in sources]
        if phases and shares == [(source.key, source.weight) for source in phases[-1].sources]:
            # The same mixture, perhaps under other names: names are how the sets are found.
            renamed = tuple(replace(old, name=new.name) for old, new in zip(phases[-1].sources, sources))
            phases[-1] = replace(phases[-1], sources=renamed)
        else:
            phases.append(Phase(first, tuple(sources)))
    return phases


def history_of(origin: Origin) -> dict[str, Any]:
    """{"complete": whether all that the model has seen is known, "seen": fingerprints}, before this run."""
    if origin.state is not None:
        return origin.state["history"]
    return {"complete": origin.kind == "scratch", "seen": []}


def read_before(origin: Origin) -> replay.Read:
    """How much of each set the model has read before this run, and before those whose position it keeps."""
    if origin.state is None:
        return {}
    read, data = origin.state["history"].get("read", {}), origin.state["data"]
    if origin.keeps_position:
        return read
    phases = [Phase.from_dict(phase) for phase in data["phases"]]
    return replay.remembered(read, phases, data["samples"], data["seq_len"], data["seed"])


def check_rewarm(config: Config, origin: Origin, plan: Plan, sets: dict[str, ShardSet]) -> None:
    """Refuses a rate that rises on data that the model has seen, unless forced: it breaks what was learned.

    Finding 3 of arXiv 2308.04014: re-warming on the same distribution raised the loss, and it had not come back within
    50B tokens. So for each schedule of the run, which may change it with a phase: on the sources of its phases.
    """
    if origin.kind == "resume":
        return
    history, spans = history_of(origin), _outline(config, origin)[1]
    seen, reached = set(history["seen"]), origin.state["lr"] if origin.state else 0.0
    for part in plan.parts:
        names = {name for span in spans if plan.part(span.first + 1) == part for name in span.weights}
        read = [source for source in config.data.train if source.name in names]
        fresh = [source.name for source in read if not source.replay]
        new = [name for name in fresh if sets[name].fingerprint not in seen]
        if (part.first, origin.kind) != (0, "scratch") and part.peak > reached * (1 + 1e-9):
            _check_rise(config, part, reached, fresh, new, history["complete"] or part is not plan)
        seen |= {sets[source.name].fingerprint for source in read}
        reached = plan.rate(part.first + part.length)


def _check_rise(config: Config, part: Plan, reached: float, fresh: list[str], new: list[str], complete: bool) -> None:
    """fresh: sources that say no replay; new: those of them that the model has not seen. complete: nothing else was seen."""
    if not new:
        where = f"{config.init.from_}: the rate" if part.first == 0 else f"after step {part.first:,} the rate"
        mend = "use init.branch: true" if part.first == 0 else "give the phase no lr"
        message = (
            f"{where} would rise from {reached:.3g} to {part.peak:.3g}, but the model has seen all of "
            f"{fresh or 'the data (every source says replay: true)'}: re-warming on the same data raises the loss "
            f"(arXiv 2308.04014, finding 3); {mend} to go on without a rise"
        )
        if not config.init.force:
            raise UserError("learning-rate-rises", message + ", or init.force: true to do it all the same")
        print(f"warning: {message}", file=sys.stderr)
    elif not complete:
        print(
            f"warning: what {config.init.from_} was trained on is not known in full; if {', '.join(new)} was part of it, "
            "re-warming will raise the loss (arXiv 2308.04014, finding 3)",
            file=sys.stderr,
        )


def check_ids(sets: Sequence[ShardSet], vocab_size: int) -> None:
    """Raises UserError when a set holds ids that the model has no row for."""
    for shard_set in sets:
        if shard_set.vocab_size > vocab_size:
            raise UserError(
                "tokenizer-beyond-model",
                f"{shard_set.path}: its tokenizer has {shard_set.vocab_size:,} ids, the model {vocab_size:,} rows; use the model's tokenizer",
            )


def check_batch(config: Config, processes: int) -> None:
    batch = config.train.batch_tokens // config.data.seq_len
    if batch < processes:
        raise UserError(
            "batch-below-processes",
            f"train.batch_tokens is {batch} sequences, fewer than {processes} processes; raise it",
        )


@dataclass(frozen=True)
class Inputs:
    """What a run is made of before there is a model. content: {"train" | "val": {name: fingerprint}}."""

    origin: Origin
    plan: Plan
    mixture: Mixture
    val_sets: dict[str, ShardSet]
    content: dict[str, dict[str, str]]


def prepare(config: Config, world: World, processes: int) -> Inputs:
    """Opens the data, finds the origin, and refuses what cannot or should not be run: the start of `train` and `plan`."""
    data = config.data
    check_batch(config, processes)
    sets = {source.name: ShardSet(source.path, data.reader) for source in data.train}
    val_sets = {entry.name: ShardSet(entry.path, data.reader) for entry in data.val}
    origin = find_origin(config, world)
    every_set = [*sets.values(), *val_sets.values()]
    check_tokenizer(config, origin, every_set)
    check_ids(every_set, origin.arch.vocab_size)
    content = {"train": fingerprints(data.train, sets), "val": fingerprints(data.val, val_sets)}
    if origin.kind == "resume":
        assert origin.state is not None
        check_resume(config, origin.state, content)
    plan = make_plan(config, origin)
    check_rewarm(config, origin, plan, sets)
    rates.check(config, origin.arch, plan)
    if origin.kind == "branch":
        assert origin.state is not None
        position = origin.state["data"]
        if (position["seq_len"], position["seed"]) != (data.seq_len, config.train.seed):
            raise UserError(
                "branch-position",
                f"init.branch keeps the data position, so data.seq_len and train.seed must stay {position['seq_len']} and "
                f"{position['seed']}; they are {data.seq_len} and {config.train.seed}",
            )
    mixture = Mixture(sets, make_phases(config, origin, sets), data.seq_len, config.train.seed)
    return Inputs(origin, plan, mixture, val_sets, content)
