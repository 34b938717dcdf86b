"""Continual pre-training: the file that torchrun runs.

    fastcpt train --config run.yaml [--section.field VALUE ...]
    torchrun --nproc_per_node=8 fastcpt/train.py --config run.yaml
    torchrun --nproc_per_node=8 -m fastcpt.train --config run.yaml

`setup` builds everything from the configuration, `train_step` is one optimizer step, `train` is the loop: evaluate,
step, log, save. The same command started again goes on from the newest checkpoint, bit for bit (`lineage.py`).

Shapes: B sequences, T tokens a sequence.
"""

import sys

if __name__ == "__main__" and sys.path and sys.path[0].rstrip("/").endswith("fastcpt"):
    del sys.path[0]  # torchrun put this file's folder first, where our modules would answer to other packages' names

import contextlib
import faulthandler
import gc
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from fastcpt import (
    UserError,
    checkpoint,
    evaluation,
    guidance,
    hf,
    lineage,
    metrics,
    parallel,
    pretraining,
    profiling,
    rates,
    replicas,
)
from fastcpt.alarms import Alarms
from fastcpt.averaging import Average
from fastcpt.config import Config, parse, to_dict, to_yaml
from fastcpt.data import batches
from fastcpt.evaluation import NamedSet
from fastcpt.execution import Execution
from fastcpt.guard import Guard, Spikes
from fastcpt.layout import Layout
from fastcpt.loss import sums_by_source
from fastcpt.model import GPTNeoX
from fastcpt.optim import AdamW
from fastcpt.replicas import Drifted
from fastcpt.saving import finishing
from fastcpt.signals import Preempted
from fastcpt.state import State, describe, evaluate, load_, local_tensors, named_tensors, save
from fastcpt.trees import Tree, order
from fastcpt.watch import Watch

MAX_SKIPPED_IN_A_ROW = 5
# Times run.timeout: an operation of all processes fails by itself only where `watch.py` did not see it.
GROUP_TIMEOUT = 6


class Diverged(Exception):
    """Several steps in a row were skipped. Exit code 3."""


# What all processes raise together, and how they then exit.
CODES: dict[type[BaseException], int] = {Diverged: 3, Drifted: 4, Preempted: 75}


def setup(config: Config) -> State:
    """Everything that a run needs, at the step where it starts or goes on. Raises UserError for what cannot be run."""
    world = parallel.start(config.train.parallel, GROUP_TIMEOUT * config.run.timeout)
    torch.manual_seed(config.train.seed)
    inputs = lineage.prepare(config, world, world.size)
    origin, train = inputs.origin, config.train
    execution = Execution.choose(
        train, world.device, origin.arch.head_width, config.data.seq_len, config.data.document_mask
    )
    spread, config = Layout.of(config, origin.arch, world)
    with torch.device("meta"):
        model = GPTNeoX(origin.arch, execution)
    spread.prepare(model, execution.dtype, train.compile)
    model.to_empty(device=world.device)
    if origin.kind == "scratch":
        model.initialise_(torch.Generator(world.device).manual_seed(train.seed))
    elif origin.kind == "pretrained":
        assert origin.path is not None
        hf.load_weights_(model, origin.path)
    moments = torch.bfloat16 if config.optim.moments == "bf16" else torch.float32
    parts = spread.locals(model)
    pieces = rates.pieces(config, model, parts)
    optimizer = AdamW(parts.values(), config.optim, execution.kernels, moments, train.deterministic, pieces)
    if spread.sharded and spread.tree:
        optimizer.whole = lambda gradients: spread.whole(model, gradients)
    elif spread.sharded:
        optimizer.reduce = spread.sum_over_shards
    validation = [
        NamedSet.open(entry.name, entry.role, inputs.val_sets[entry.name], config.data.seq_len, config.run.eval_tokens)
        for entry in config.data.val
    ]
    state = State(
        config, world, origin, inputs.plan, inputs.mixture, validation, model, spread, parts, model, optimizer,
        pretraining.history(origin, inputs.plan, inputs.content),
        interval=torch.zeros(len(inputs.mixture.sets), 2, dtype=torch.float64, device=world.device),
        skipped=torch.zeros(2, dtype=torch.int64, device=world.device),
        guard=Guard(world, Spikes(train.skip_spikes, world.device) if train.skip_spikes else None),
        average=Average(parts, train.ema, train.batch_tokens) if train.ema else None,
    )  # fmt: skip
    if state.average:
        state.average.start()
    if origin.state is not None:
        load_(state)
    state.forward = spread.finish(model, train.compile)
    return state


def pinned(windows_BT: np.ndarray) -> Tensor:
    """Windows in page-locked memory, of their dtype, for the thread that reads ahead.

    torch's own allocator hands the memory out anew only when the copies that were started from it are done; it knows
    them by the tensor, so slices are taken of the tensor and not of an array that shares its memory.
    """
    return torch.from_numpy(windows_BT).pin_memory()


def train_step(state: State, batch_BT: np.ndarray | Tensor) -> dict[str, Tensor]:
    """One optimizer step on this process's windows, (B, T+1) token ids in host memory, pinned or not.

    Gradients are those of the sum of the losses; the optimizer divides them by the token count of all processes, so
    neither the micro-batch nor the number of processes changes them, and the loss's own gradient is 1. Returns fp32
    scalars on the device, without waiting for it: "loss" (mean nats a token of this process), "grad_norm" (before
    clipping), "skipped" (1.0 if the gradient was not finite).
    """
    config, world, layout = state.config, state.world, state.layout
    micro_batch, attend = config.train.micro_batch, state.model.execution.attention
    batch = config.train.batch_tokens // config.data.seq_len
    own = state.samples + layout.share * batch // world.size  # this process's first sample
    sources_B = state.mixture.source_numbers(own, len(batch_BT))
    totals = torch.zeros_like(state.interval)
    count = -(-len(batch_BT) // micro_batch)
    losses: list[Tensor] = [totals] * count
    tree = Tree(count) if layout.tree else None
    for number, turn in enumerate(order(count) if tree else range(count)):
        first = turn * micro_batch
        rows_BT = torch.as_tensor(batch_BT)[first : first + micro_batch]
        window_BT = parallel.to_device(rows_BT, world.device)
        tokens_BT, targets_BT = window_BT[:, :-1], window_BT[:, 1:].contiguous()
        masked = config.data.document_mask
        documents = attend.documents(rows_BT[:, :-1].numpy(), _eod(state), world.device) if masked else None
        with layout.accumulate(state.forward, last=number == count - 1):
            loss, losses_BT = state.forward(tokens_BT, targets_BT, documents, total=True)
            loss.backward()
        part_B = torch.from_numpy(sources_B[first : first + micro_batch]).to(world.device, non_blocking=True)
        sums = sums_by_source(losses_BT, part_B, len(totals))
        losses[turn] = losses_BT.detach()
        if tree:
            gradients = layout.gradients(state.model)
            if not layout.sharded:
                gradients = layout.tree_reduced(gradients)
            tree.add([*layout.tree_reduced([sums]), *gradients])
        else:
            totals += sums
    if tree or layout.sharded:  # else they are where they belong
        totals, *gradients = tree.sums if tree else (totals, *layout.gradients(state.model))
        for part, gradient in zip(state.parts.values(), gradients, strict=True):
            part.grad = gradient
    # On a CPU the norm is a pass over memory: it leaves out the rows of tokens that this step did not read.
    if tree is None and world.size == 1 and world.device.type == "cpu":
        tokens = torch.from_numpy(np.bincount(np.asarray(batch_BT)[:, :-1].flat).nonzero()[0])
        state.optimizer.rows = {state.parts["embed_in.weight"]: tokens}
    state.optimizer.veto = state.guard.veto(totals.sum(0))
    # Where gradients are averages over processes, the factor makes them sums.
    scale = (world.size if layout.averages else 1) / config.train.batch_tokens
    norm, skipped = state.optimizer.clipped_step(state.plan.rate(state.step + 1), scale, state.embeddings_only)
    if state.average:
        state.average.update()
    state.step += 1
    state.guard.record(state.step, state.samples, batch, own, skipped, losses)
    state.samples += batch
    applied = skipped == 0
    if tree is None or world.first:  # in a fixed order the totals are those of all processes
        state.interval += torch.where(applied, totals, 0.0)
    state.skipped[0] += skipped.long()
    state.skipped[1] = torch.where(applied, 0, state.skipped[1] + 1)
    nats, tokens = totals.sum(0)
    return {"loss": (nats / tokens).float(), "grad_norm": norm, "skipped": skipped}


def _eod(state: State) -> int:
    return next(iter(state.mixture.sets.values())).eod


@finishing()
def train(config: Config) -> State:
    """Trains to the last step; started again with the same output it goes on from its newest checkpoint.

    Raises Preempted when a signal came and everything is saved, and those of CODES.
    """
    with contextlib.ExitStack() as stack:
        return _train(config, stack)


def _train(config: Config, stack: contextlib.ExitStack) -> State:
    """The loop."""
    started = time.perf_counter()
    folder = Path(config.run.output)
    world = parallel.start(config.train.parallel, GROUP_TIMEOUT * config.run.timeout)
    locks: list[TextIO] = []
    world.on_first(lambda: locks.append(checkpoint.lock(folder)))
    for lock in locks:
        stack.callback(lock.close)
    watch = stack.enter_context(Watch(world, folder, config.run.timeout, CODES))
    state = setup(config)
    profile = stack.enter_context(profiling.Profile(state))
    run, first = config.run, world.first
    resumed_at = state.step if state.origin.kind == "resume" else None
    loggers = metrics.open_loggers(run, to_dict(config), resumed_at, not state.unevaluated) if first else []
    if first:
        (folder / "config.yaml").write_text(to_yaml(config))
        print(describe(state), *(f"advice: {text}" for text in guidance.advice(state)), sep="\n", flush=True)

    console = metrics.Console(state.last_step, config.train.batch_tokens, shown=first)

    alarms = Alarms(state.plan)
    if first:
        alarms.read(folder / "metrics.jsonl")

    def report(line: dict[str, Any]) -> None:
        for each in (line, *alarms.see(line)) if first else ():
            for logger in loggers:
                logger.log(each)
            console.log(each)

    def report_events() -> None:
        for line in state.guard.events(config.data.seq_len):
            report(line)

    def passing() -> None:
        if watch.beat(state.step, "evaluating"):
            raise Preempted
        watch.ask()

    def evaluated() -> bool:
        """Does what is due of this step; false if a signal came before its end."""
        console.busy(state.step, "evaluating")
        report_events()
        try:
            line = evaluate(state, passing)
        except Preempted:
            return False
        report(line)
        if first and state.step == state.plan.first:
            console.print(*(f"advice: {text}" for text in guidance.after_start(state, line["eval"])))
        state.unevaluated = False
        return True

    def check_replicas() -> None:
        if (copies := state.layout.copies()) and state.checked < state.step:
            ranks, group = copies
            names = [watch.names[rank] for rank in ranks]
            replicas.check(local_tensors(state), state.step, state.checked, names, group)
        state.checked = state.step

    def save_all() -> None:
        watch.enter(state.step, "saving")
        console.busy(state.step, "saving")
        check_replicas()
        report_events()
        for logger in loggers:
            logger.sync()
        save(state)

    def leave() -> None:
        """A signal came: saves, and ends."""
        pause = time.perf_counter()
        save_all()
        state.saver.wait()
        for logger in loggers:
            logger.close()
        message = f"preempted at step {state.step}, saved in {time.perf_counter() - pause:.1f} s"
        if first:
            print(message, flush=True)
        raise Preempted(message)

    peak = metrics.peak_flops(world.device, state.model.execution.dtype) * world.size
    flops = metrics.flops_per_token(state.model.arch, config.data.seq_len)
    state.unevaluated |= bool(state.validation) and state.step == state.plan.first
    if state.unevaluated and not evaluated():
        leave()
    batch, steps = config.train.batch_tokens // config.data.seq_len, state.last_step - state.step
    if steps:
        state.saver.check_room(min(state.step + run.save_every, state.last_step), named_tensors(state))
    clock, clock_step = time.perf_counter(), state.step  # of the throughput; stands still in evaluations and saves
    ready = {"ready": pinned} if world.device.type == "cuda" else {}
    ahead = batches(state.mixture, state.samples, steps, batch, state.layout.share, world.size, **ready)
    watch.enter(state.step, "compiling" if config.train.compile else "training")
    for windows in console.follow(ahead, state.step):
        watch.ask()
        result = train_step(state, windows)
        state.saver.poll()
        stop = watch.beat(state.step, "training")
        last = state.step == state.last_step
        if state.step == state.last_step - steps + 1 and gc.get_freeze_count() == 0:  # which counts one by one
            gc.collect()  # what lives from here on lives long: later collections need not look at it
            gc.freeze()
        if state.step % run.log_every == 0 or last:
            report_events()
            by_source = world.sum_(state.interval).tolist()  # the one wait for the device of an interval
            state.interval.zero_()
            skipped, in_a_row = state.skipped.tolist()
            elapsed = time.perf_counter() - clock
            rate = (state.step - clock_step) * config.train.batch_tokens / elapsed
            nats, tokens = (sum(column) for column in zip(*by_source))
            report({
                "step": state.step, "tokens": state.tokens, "loss": nats / tokens if tokens else math.nan,
                "loss_by_source": {
                    name: nats / tokens for name, (nats, tokens) in zip(state.mixture.sets, by_source) if tokens
                },
                "lr": state.plan.rate(state.step), "grad_norm": result["grad_norm"].item(), "skipped": skipped,
                "tokens_per_second": rate, "mfu": rate * flops / peak, "seconds": time.perf_counter() - started,
                "eta_seconds": (state.last_step - state.step) * config.train.batch_tokens / rate,
                "peak_memory_bytes": metrics.peak_memory(world.device),
            })  # fmt: skip
            if in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise Diverged(
                    f"step {state.step}: gradients were not finite {in_a_row} steps in a row; lower optim.lr"
                    if not config.train.skip_spikes
                    else f"step {state.step}: {in_a_row} steps in a row were skipped, not finite or spikes (metrics.jsonl "
                    "says which); lower optim.lr, or raise train.skip_spikes"
                )
            if world.device.type == "cpu":  # others may have had the cores when it was first measured
                peak = max(peak, metrics.peak_flops(world.device, state.model.execution.dtype, repeats=1) * world.size)
            clock, clock_step = time.perf_counter(), state.step
        pause = time.perf_counter()
        state.unevaluated = bool(state.validation) and evaluation.is_due(
            state.step, state.last_step, run.eval_every, state.plan.part(state.step).warmup_end
        )
        if state.unevaluated and not stop:
            stop = not evaluated()
        if stop and (state.unevaluated or not last):
            leave()
        if state.step % run.save_every == 0 or last:
            save_all()
        elif run.check_every and state.step % run.check_every == 0:
            check_replicas()
        profile.at(state.step)
        watch.enter(state.step, "training")
        clock += time.perf_counter() - pause
    state.saver.wait()
    if first and steps == 0:
        print(f"{folder}: complete at step {state.step}")
    for logger in loggers:
        logger.close()
    return state


def main(arguments: list[str] | None = None) -> int:
    """The command line's `train`; returns the exit code."""
    # A process that dies in C, of a mapped file that shrank for one, says where.
    faulthandler.enable(sys.__stderr__ or 2)
    first = os.environ.get("RANK", "0") == "0"
    try:
        train(parse(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        if first:
            print(f"fastcpt: {error.line}", file=sys.stderr)
        return 2
    except Preempted:
        return CODES[Preempted]
    except (Diverged, Drifted) as error:
        if first:
            print(f"fastcpt: {error}", file=sys.stderr)
        return CODES[type(error)]
    finally:
        parallel.stop()
    return 0


if __name__ == "__main__":
    parallel.leave(main())
