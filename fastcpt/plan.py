"""What a run will cost, before it starts: work, data, memory, disk, evaluation, the learning rate, and advice.

    fastcpt plan --config FILE [--gpus N] [--per-machine M] [--memory GIB] [--gpu NAME [--price P]]
                 [--priority new|balanced|old] [--budget TOKENS] [--shift] [--without-data]
                 [--section.field VALUE ...]
    fastcpt plan --table            every Pythia on 1, 8, 64 and 512 of each GPU

Formulas alone: no weight is read, no model is built (but for --shift, which evaluates the start), nothing is written.
What `train` would refuse is refused here, and what it would advise is advised, by the same functions.
"""

import argparse
import math
import os
import shutil
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastcpt import (
    UserError,
    checkpoint,
    cost,
    guidance,
    hf,
    layout,
    lineage,
    memory,
    metrics,
    pretraining,
    published,
    replay,
    shift,
    spending,
    unread,
)
from fastcpt.config import Config, Count, parse
from fastcpt.data import Mixture
from fastcpt.evaluation import NamedSet
from fastcpt.metrics import short_count
from fastcpt.parallel import World
from fastcpt.schedules import BLOCKS, Plan, drawing

PER_MACHINE, MEMORY_GIB = 8, 80  # unless they are said: processes of a machine, memory of the device of each
WIDTH = 100  # columns of the output


@dataclass(frozen=True)
class Prepared:
    """A run that could start: what `train.setup` derives from a configuration before it builds a model.

    config: with a micro-batch, which the layout's reason speaks of where it was chosen: micro_batch.
    step, samples: done before the run starts or goes on. share: sequences a step of the process that takes the most.
    machine: processes on each machine. device_bytes: memory of the device of each. gpu: which of `cost.DEVICES` it is, None:
    not said. price: of a GPU-hour, in any currency. asked: for advice.
    """

    config: Config
    processes: int
    origin: lineage.Origin
    plan: Plan
    mixture: Mixture
    validation: list[NamedSet]
    step: int
    samples: int
    share: int
    machine: int = PER_MACHINE
    device_bytes: int = MEMORY_GIB << 30
    gpu: str | None = None
    price: float | None = None
    micro_batch: str = ""
    asked: guidance.Asked = field(default_factory=guidance.Asked)
    without_data: bool = False

    @property
    def last_step(self) -> int:
        return max(self.step, self.plan.last_step(self.config.run.stop_at))

    @property
    def world(self) -> World:
        """The processes, on the kind of device that they will have: a GPU if one is named or there is one."""
        return World(0, self.processes, torch.device("cuda" if self.gpu or torch.cuda.is_available() else "cpu"))

    @property
    def spread(self) -> tuple[layout.Kind, bool, str]:
        """See `layout.choose`."""
        needed = memory.needed(self.config, self.origin.arch, self.world)
        return layout.choose(
            self.config.train, self.processes, min(self.processes, self.machine), needed, self.device_bytes
        )

    @property
    def shards(self) -> int:
        return {"single": 1, "ddp": 1, "hsdp": self.machine, "fsdp": self.processes}[self.spread[0]]

    @property
    def largest_kept(self) -> int:
        """The largest micro-batch up to `train.micro_batch` of which no block must be recomputed, or 0."""
        room, most = layout.ROOM * self.device_bytes, self.config.train.micro_batch
        return memory.largest(self.config, self.origin.arch, self.world, self.shards, False, room, most)

    @property
    def tokens(self) -> int:
        """Still to be trained on."""
        return (self.last_step - self.step) * self.config.train.batch_tokens


def prepare(config: Config, processes: int, without_data: bool = False, **hardware: Any) -> Prepared:
    """The steps of `train.setup` up to the model, in its order. Raises the UserError that it would raise.

    without_data: neither the sets nor the start are opened. hardware: the fields of `Prepared` from `machine` on."""
    data, train = config.data, config.train
    if processes == 1 and train.parallel not in ("auto", "single"):
        raise UserError(
            "parallel-alone",
            f"train.parallel is {train.parallel}, but there is one process; say --gpus N, or use auto",
        )
    if processes > 1 and train.parallel == "single":
        raise UserError("parallel-single", f"train.parallel is single, but there are {processes} processes; use auto")
    if without_data:
        lineage.check_batch(config, processes)
        inputs, validation = unread.inputs(config), unread.validation(config)
    else:
        inputs = lineage.prepare(config, World(0, 1, torch.device("cpu")), processes)
        if inputs.origin.kind == "pretrained" and inputs.origin.path is not None:
            hf.headers(inputs.origin.path)
        fixed = data.seq_len, config.run.eval_tokens
        validation = [NamedSet.open(entry.name, entry.role, inputs.val_sets[entry.name], *fixed) for entry in data.val]
    origin = inputs.origin
    step, samples = (
        (origin.state["step"], origin.state["data"]["samples"]) if origin.state and origin.keeps_position else (0, 0)
    )
    share = -(-train.batch_tokens // data.seq_len // processes)
    prepared = Prepared(
        config, processes, origin, inputs.plan, inputs.mixture, validation, step, samples, share,
        without_data=without_data, **hardware,
    )  # fmt: skip
    config, note = layout.with_micro_batch(
        config, origin.arch, prepared.world, min(processes, prepared.machine), prepared.device_bytes
    )
    prepared = replace(prepared, config=config, micro_batch=note)
    layout.check(config, prepared.spread[0], processes)
    return prepared


def uses(prepared: Prepared) -> list[spending.Use]:
    return spending.uses(prepared.mixture, prepared.samples, prepared.tokens // prepared.config.data.seq_len)


def multiples(after: int, until: int, every: int) -> int:
    """Multiples of `every` in (after, until]."""
    return max(0, until // every - after // every)


def evaluations(prepared: Prepared) -> tuple[int, int, float]:
    """(how many evaluations are still to come, tokens of one, their compute as a share of training's).

    Counts what the loop of `train` finds due (`evaluation.is_due`), without looping. A forward pass is a third of a
    training step's FLOPs a token, and each set is padded to whole micro-batches.
    """
    step, last, config = prepared.step, prepared.last_step, prepared.config
    every, micro = config.run.eval_every, config.train.micro_batch
    times = int(step == prepared.plan.first)
    if last > step:  # the last step is always due
        times += 1
        for part in prepared.plan.parts:
            begin, end = max(step, part.first), min(part.first + part.length, last - 1)
            warm, often = min(part.warmup_end, end), max(1, every // 4)
            times += multiples(begin, warm, often) + multiples(max(begin, warm), end, every)
            times += begin < part.warmup_end <= end and part.warmup_end % often > 0  # the peak is evaluated, too
    windows = [len(named.windows) for named in prepared.validation]
    padded = sum(-(-count // micro) * micro for count in windows) * config.data.seq_len
    share = times * padded / 3 / prepared.tokens if prepared.tokens else 0.0
    return times if windows else 0, sum(windows) * config.data.seq_len, share


@dataclass(frozen=True)
class Disk:
    """checkpoint, export: bytes of one. written: checkpoints still to be written. kept: the most that there are at once,
    between the writing of a new one and the removal of the oldest. needed: bytes more than now; free: bytes."""

    checkpoint: int
    export: int
    written: int
    kept: int
    needed: int
    free: int


def disk(prepared: Prepared) -> Disk:
    """12 bytes a parameter (weights and two moments, fp32; 16 with train.ema), 4 for an export; tokenizer, names and hashes."""
    run, arch, step, last = prepared.config.run, prepared.origin.arch, prepared.step, prepared.last_step
    count, tensors, copies = metrics.parameter_count(arch), 12 * arch.layers + 4, 3 + bool(prepared.config.train.ema)
    first_set = next(iter(prepared.mixture.sets.values()))
    tokenizer = 0 if prepared.without_data else (first_set.path / "tokenizer.json").stat().st_size
    # Beside the tensors, as measured: 190 bytes of header for one, 22 of hash for 1 MiB, 12 KB of state.
    saved = copies * (int(4 * count * (1 + 22 / 2**20)) + 190 * tensors) + 12_000 + tokenizer
    written = multiples(step, last - 1, run.save_every) + 1 if last > step else 0
    there = checkpoint.steps(Path(run.output))
    more = max(1, run.keep + 1 - len(there))
    if run.keep_every:  # those stay; of those that are there as many fewer can go
        stay = multiples(step, last - 1, math.lcm(run.save_every, run.keep_every)) + (last % run.keep_every == 0)
        more = max(1, run.keep + 1 - sum(known % run.keep_every != 0 for known in there)) + stay
    more = min(written, more)
    free = shutil.disk_usage(next(path for path in (Path(run.output).resolve() / "x").parents if path.exists())).free
    return Disk(saved, 4 * count + tokenizer + 120 * tensors, written, len(there) + more, more * saved, free)


def advice(prepared: Prepared) -> list[str]:
    """What deserves a second look: what the papers say, as `train` prints it, and what the formulas do."""
    config, plan, space = prepared.config, prepared.plan, disk(prepared)
    lines = guidance.advice(prepared, prepared.asked)
    micro = config.train.micro_batch
    if (whole := plan.steps * config.train.batch_tokens) != config.train.tokens:
        lines.append(f"train.tokens is not a whole number of steps: rounded up to {whole:,}")
    if micro < prepared.share and 0 < (rest := prepared.share % micro) < micro / 2:
        even = -(-prepared.share // -(-prepared.share // micro))
        lines.append(f"a step's last micro-batch is {rest} sequences of up to {micro}; as many would do with {even}")
    if config.train.recompute == "auto" and prepared.spread[1] and (fewer := prepared.largest_kept):
        lines.append(f"blocks are recomputed, which takes time; with train.micro_batch {fewer} they need not be")
    if (share := evaluations(prepared)[2]) > 0.1:
        lines.append(f"evaluation adds {share:.0%} of compute; raise run.eval_every or lower run.eval_tokens")
    if space.needed > space.free:
        lines.append(f"checkpoints take {size(space.needed)} more, {size(space.free)} are free; lower run.keep or move")
    return lines


def size(count: float) -> str:
    """Bytes with a binary unit."""
    power = max(0, int(count).bit_length() - 1) // 10
    return f"{count / 1024**power:.2f} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"


def _fold(label: str, text: str) -> str:
    """`text` beside its label, folded to the width of the output."""
    return textwrap.fill(text, WIDTH, initial_indent=f"{label:<15}", subsequent_indent=" " * 15, break_on_hyphens=False)


def _work(prepared: Prepared) -> list[str]:
    """Where the run starts, the model, its compute and its steps."""
    config, origin, arch, tokens = prepared.config, prepared.origin, prepared.origin.arch, prepared.tokens
    parameters, seq_len, micro = metrics.parameter_count(arch), config.data.seq_len, config.train.micro_batch
    full, causal = (metrics.flops_per_token(arch, seq_len, halved) for halved in (False, True))
    moments = pretraining.describe(config, origin, prepared.plan)
    at = f"step {origin.state['step']:,}" if origin.state else ""
    start = {
        "scratch": "scratch: new weights",
        "pretrained": f"pretrained: {config.init.from_}; {moments}",
        "continue": f"continue: weights of {origin.path} at {at}; data and schedule from their start; {moments}",
        "branch": f"branch: {origin.path} goes on from {at} with its moments, data position and rate",
        "resume": f"resume: {config.run.output} goes on from {at} of {prepared.last_step:,}",
    }[origin.kind]
    rows = {
        "start": start + ("; complete, nothing is left to do" if tokens == 0 else ""),
        "model": f"{arch.layers} layers, {arch.width:,} wide, {arch.heads} heads, {arch.vocab_size:,} ids",
        "parameters": f"{parameters:,}; {parameters - 2 * arch.vocab_size * arch.width:,} without embeddings",
        "compute": f"{full / 1e9:.3g} GFLOP a token with attention counted as full, {causal / 1e9:.3g} as causal; "
        f"in all {full * tokens:.3g} or {causal * tokens:.3g} FLOPs",
        "steps": f"{prepared.last_step - prepared.step:,} of {config.train.batch_tokens:,} tokens: {short_count(tokens)} "
        f"tokens ({tokens:,}); {prepared.plan.warmup:,} steps of warm-up",
        "processes": f"{prepared.processes}, a step each {-(-prepared.share // micro)} micro-batches of up to "
        f"{min(micro, prepared.share)} x {seq_len:,} tokens",
    }
    return [_fold(label, text) for label, text in rows.items()]


def _data(prepared: Prepared) -> list[str]:
    seq_len, batch = prepared.config.data.seq_len, prepared.config.train.batch_tokens
    given, phases = prepared.tokens // seq_len, spending.phases(prepared.mixture, prepared.samples)
    shown = spending.table(uses(prepared), seq_len, known=not prepared.without_data)
    if len(phases) > 1:
        shown += ["", *spending.by_phase(phases, prepared.step, prepared.samples, given, batch // seq_len, seq_len)]
    if prepared.without_data:
        shown += ["", _fold("without data", f"not known: {unread.MISSING}")]
    elif again := replay.notes(prepared.mixture, prepared.samples):
        shown += ["", *(_fold("replay", note) for note in again)]
        shown.append(_fold("", "its tokens are among those of the run: new text is as many fewer (compute-equivalent)"))
    return shown


def _memory(prepared: Prepared) -> list[str]:
    """Of a GPU where one is named or there is one: with Triton kernels. Else as on this machine."""
    config, world, (kind, recompute, why) = prepared.config, prepared.world, prepared.spread
    parts = memory.of(config, prepared.origin.arch, world, prepared.shards, recompute)
    notes = memory.notes(config, world, prepared.shards, recompute, min(config.train.micro_batch, prepared.share))
    rows = [*parts.items(), ("total", sum(parts.values()))]
    shown = [f"  {name:<12} {size(value):>12}   {notes[name]}" for name, value in rows if value]
    why = f"{why}; {prepared.micro_batch}" if prepared.micro_batch else why
    where = "Triton kernels" if memory.uses_kernels(config, world) else "torch kernels; --gpu says it for a GPU"
    return [_fold("layout", f"{kind}: {why}"), f"memory of a process, {config.train.precision}, {where}", *shown]


def _speed(prepared: Prepared) -> list[str]:
    """Of the GPU that was named, by the model of `cost.py`."""
    config, train = prepared.config, prepared.config.train
    if prepared.gpu is None:
        return []
    if train.precision != "bf16":
        return [_fold("speed", "not predicted: the model of it knows train.precision: bf16 alone")]
    kind, recompute, _ = prepared.spread
    job = cost.Job(
        prepared.origin.arch, cost.DEVICES[prepared.gpu], config.data.seq_len, min(train.micro_batch, prepared.share),
        train.batch_tokens / prepared.processes, prepared.processes, min(prepared.machine, prepared.processes), kind,
        float(recompute), cost.OURS if config.optim.moments == "fp32" else cost.OURS_BF16_MOMENTS,
    )  # fmt: skip
    rows = cost.describe(job, prepared.gpu, prepared.tokens, evaluations(prepared)[2], prepared.price)
    basis = (
        "a model (fastcpt/cost.py) of compiled training with Triton kernels; this project measured none of it on a GPU"
    )
    return [_fold(label, text) for label, text in (rows | {"basis": f"{basis}; {published.summary()}"}).items()]


def _results(prepared: Prepared) -> list[str]:
    space, (times, tokens, share) = disk(prepared), evaluations(prepared)
    rows = {
        "checkpoints": f"{space.written:,} of {size(space.checkpoint)}, at most {space.kept} at once: "
        f"{size(space.needed)} more in {prepared.config.run.output}, {size(space.free)} free",
        "export": f"{size(space.export)} as a Hugging Face model, fp32",
        "evaluation": f"{times:,} x {short_count(tokens)} tokens: {short_count(times * tokens)}, {share:.2%} of the compute",
    }
    return [_fold(label, text) for label, text in rows.items()]


def render(prepared: Prepared, glyphs: str = BLOCKS) -> str:
    """The plan as text of at most WIDTH columns, an entry to be copied apart, and about 60 lines."""
    warnings = []
    for text in advice(prepared):
        sentence, *entry = text.split("\n")
        warnings += [_fold("warning", sentence), *(f"{'':<15}{line}" for line in entry)]
    parts = (
        _work(prepared), _data(prepared), _memory(prepared), _speed(prepared), _results(prepared),
        [*drawing(prepared.plan, glyphs), _fold("", prepared.plan.describe())], warnings,
    )  # fmt: skip
    return "\n\n".join("\n".join(part) for part in parts if part)


def main(arguments: list[str]) -> int:
    """Prints the plan that a command's options ask for, or the table. Raises UserError."""
    parser = argparse.ArgumentParser("fastcpt plan", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--gpus", default=os.environ.get("WORLD_SIZE", "1"))
    parser.add_argument("--per-machine", default=str(PER_MACHINE))
    parser.add_argument("--memory")
    parser.add_argument("--gpu")
    parser.add_argument("--price")
    parser.add_argument("--priority", choices=guidance.PARTS)
    parser.add_argument("--budget", type=Count.parse)
    parser.add_argument("--shift", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--without-data", action="store_true")
    try:
        known, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError("options-wrong", f"{error}; `fastcpt plan --help` says what there is") from None
    if known.table:
        print("\n".join(cost.table()))
        return 0
    for name in ("gpus", "per_machine", "memory"):
        value = getattr(known, name)
        if value is not None and not (value.isascii() and value.isdigit() and int(value) >= 1):
            raise UserError(
                "option-out-of-range", f"--{name.replace('_', '-')} {value!r}: write a whole number, from 1 on"
            )
    if known.gpu is not None and known.gpu not in cost.DEVICES:
        raise UserError("gpu-unknown", f"--gpu {known.gpu!r} is unknown; known are {', '.join(cost.DEVICES)}")
    try:
        price = None if known.price is None else float(known.price)
    except ValueError:
        price = -1.0
    if price is not None and (known.gpu is None or not 0 < price < math.inf):
        raise UserError(
            "price-invalid", f"--price {known.price!r}: write the price of a GPU-hour, a number above 0, and --gpu NAME"
        )
    room = int(cost.DEVICES[known.gpu].memory) if known.gpu else MEMORY_GIB << 30
    config = parse(rest)
    prepared = prepare(
        config, int(known.gpus), known.without_data or unread.is_preset(rest, config), machine=int(known.per_machine), gpu=known.gpu, price=price,
        device_bytes=int(known.memory) << 30 if known.memory else room,
    )  # fmt: skip
    measured = shift.measured(prepared.config, prepared.origin) if known.shift else None
    prepared = replace(prepared, asked=guidance.Asked(known.priority, known.budget, measured))
    print(render(prepared, guidance.glyphs()))
    return 0
