"""A run in memory, what of it a checkpoint holds, and how it is evaluated."""

import base64
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastcpt import checkpoint, evaluation, guidance, lineage, metrics, pretraining, rates, replay
from fastcpt.averaging import Average
from fastcpt.config import Config, to_dict, to_yaml
from fastcpt.data import Mixture
from fastcpt.evaluation import NamedSet
from fastcpt.guard import Guard
from fastcpt.integrity import sha256_json
from fastcpt.layout import Layout
from fastcpt.model import GPTNeoX
from fastcpt.optim import AdamW
from fastcpt.parallel import World
from fastcpt.saving import Saver
from fastcpt.schedules import Plan


@dataclass
class State:
    """A run in memory."""

    config: Config
    world: World
    origin: lineage.Origin
    plan: Plan
    mixture: Mixture
    validation: list[NamedSet]
    model: GPTNeoX
    layout: Layout
    parts: dict[str, nn.Parameter]  # this process's part of each parameter, what the optimizer works on
    forward: nn.Module  # the model, or DDP around it
    optimizer: AdamW
    history: dict[str, Any]
    # Since the last log line, of each source: nats and tokens, (S, 2) float64 on the device. Skipped steps count nothing.
    interval: Tensor
    # Steps skipped in all, and in a row until now, int64 on the device.
    skipped: Tensor
    guard: Guard
    average: Average | None = None
    step: int = 0
    samples: int = 0
    start_losses: dict[str, float] = field(default_factory=dict)  # of each validation set, before the first step
    unevaluated: bool = False  # this step's evaluation is due, and a signal came before its end
    checked: int = 0  # the step at which replicas were known to be the same
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        run = self.config.run
        self.saver = Saver(Path(run.output), self.world, run.keep, run.keep_every)

    @property
    def tokens(self) -> int:
        return self.samples * self.config.data.seq_len

    @property
    def embeddings_only(self) -> bool:
        """Whether the next step updates both embeddings alone."""
        return self.step < self.plan.first + rates.first_steps(self.config, self.plan)

    @property
    def last_step(self) -> int:
        return max(self.step, self.plan.last_step(self.config.run.stop_at))


def named_tensors(state: State) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name: model.*, exp_avg.*, exp_avg_sq.* and ema.*; DTensors where they are sharded."""
    state.layout.reshard(state.model)
    tensors = {}
    for name, parameter in state.model.named_parameters():
        moments = state.optimizer.state[state.parts[name]]
        tensors[f"model.{name}"] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = state.layout.like(parameter, moments[moment])
        if state.average:
            tensors[f"ema.{name}"] = state.layout.like(parameter, state.average.tensors[name])
    return tensors


def local_tensors(state: State) -> dict[str, Tensor]:
    """`named_tensors`, of sharded ones this process's part."""
    return {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in named_tensors(state).items()
    }


def save(state: State) -> Path:
    """Starts to write a checkpoint of this step, in the background: `state.saver.wait()` returns when it is on disk.

    Those that `run.keep` and `run.keep_every` no longer keep go afterwards. Returns the folder that there will be.
    Raises what the save before met.
    """
    config, world = state.config, state.world
    first_set = next(iter(state.mixture.sets.values()))
    data = {
        "samples": state.samples,
        "seq_len": config.data.seq_len,
        "seed": config.train.seed,
        "phases": [asdict(phase) for phase in state.mixture.phases],
        "seen": state.mixture.seen(state.samples),
        "fingerprints": {
            "train": {name: shard_set.fingerprint for name, shard_set in state.mixture.sets.items()},
            "val": {named.name: named.shards.fingerprint for named in state.validation},
        },
    }
    values = {
        "step": state.step,
        "tokens": state.tokens,
        "lr": state.plan.rate(state.step),
        "adam_updates": state.optimizer.updates,
        "architecture": asdict(state.model.arch),
        "eod_token": first_set.manifest["tokenizer"]["eod_token"],
        "plan": state.plan.to_dict(),
        "data": data,
        "history": state.history,
        "start_losses": state.start_losses,
        "unevaluated": state.unevaluated,
        # Of each process: sums in another order would differ in their last bits from those of a run without this save.
        "interval": world.gather(state.interval.tolist()),
        "skipped": state.skipped.tolist(),
        "spikes": state.guard.spikes.to_dict() if state.guard.spikes else None,
        "rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        "config": to_dict(config),
    }
    files = {
        "config.yaml": to_yaml(config).encode(),
        "tokenizer.json": (first_set.path / "tokenizer.json").read_bytes(),
    }
    fingerprints = {
        "config": sha256_json(to_dict(config)),
        "tokenizer": first_set.manifest["tokenizer"]["fingerprint"],
        "data": sha256_json(data["fingerprints"]),
    }
    return state.saver.save(state.step, named_tensors(state), values, files, fingerprints)


def load_(state: State) -> None:
    """Reads what the run's kind takes from its checkpoint."""
    origin, world = state.origin, state.world
    assert origin.path is not None and origin.state is not None
    values = origin.state
    keeps_moments = origin.keeps_position or state.config.init.optimizer == "keep"
    tensors = named_tensors(state)
    keeps_average = origin.keeps_position and values["config"]["train"].get("ema") is not None
    kept = ("model.", *(("exp_avg",) if keeps_moments else ()), *(("ema.",) if keeps_average else ()))
    checkpoint.load_tensors_(origin.path, {k: v for k, v in tensors.items() if k.startswith(kept)}, world)
    if state.average and not keeps_average:
        state.average.start()
    if keeps_moments:
        state.optimizer.set_updates(values["adam_updates"])
    if origin.keeps_position:
        state.step, state.samples = values["step"], values["data"]["samples"]
        state.checked = state.step
    if origin.kind == "resume":
        state.start_losses, state.unevaluated = values["start_losses"], values["unevaluated"]
        if state.unevaluated and state.step == state.last_step:
            # A start since then may have evaluated, and nothing was saved after.
            log = Path(state.config.run.output) / "metrics.jsonl"
            state.unevaluated = not world.on_first(lambda: metrics.has_evaluation(log, state.step))
        parts = torch.tensor(values["interval"], dtype=torch.float64)
        if len(parts) == world.size:
            state.interval.copy_(parts[world.rank])
        elif world.first:
            state.interval.copy_(parts.sum(0))
        state.skipped.copy_(torch.tensor(values["skipped"]))
        if state.guard.spikes is not None:
            state.guard.spikes.load_(values["spikes"])
        rng = np.frombuffer(base64.b64decode(values["rng"]), np.uint8)
        torch.set_rng_state(torch.from_numpy(rng.copy()))


def evaluate(state: State, passing: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """An evaluation line: every validation set now, and the change since the start; at the end also those of the moving
    average of the weights, as "ema". passing: see `evaluation.evaluate`."""
    config = state.config

    def measure() -> dict[str, dict[str, Any]]:
        state.layout.reshard(state.model)
        return {
            named.name: evaluation.evaluate(
                state.model, named, config.data.seq_len, config.train.micro_batch, config.data.document_mask, state.world,
                passing=passing,
            )
            for named in state.validation
        }  # fmt: skip

    results = measure()
    at_end = state.average is not None and state.step == state.last_step
    averaged = {"ema": state.average.swapped(measure)} if state.average and at_end else {}
    state.layout.reshard(state.model)
    if not state.start_losses:
        state.start_losses = {name: entry["loss"] for name, entry in results.items()}
    return {
        "step": state.step,
        "tokens": state.tokens,
        "eval": results,
        **evaluation.changes(results, state.start_losses),
        **averaged,
    }


def describe(state: State) -> str:
    """The run's arithmetic, for people."""
    config, world, plan, arch = state.config, state.world, state.plan, state.model.arch
    train, seq_len = config.train, config.data.seq_len
    flops = metrics.flops_per_token(arch, seq_len)
    micro_batches = -(-train.batch_tokens // seq_len // (world.size * train.micro_batch))
    precision = str(state.model.execution.dtype).removeprefix("torch.")
    note = " (no bf16 instructions here)" if (train.precision, precision) == ("bf16", "float32") else ""
    where = {"scratch": "new weights", "resume": f"step {state.step}"}.get(state.origin.kind, config.init.from_)
    how = "compiled" if train.compile else "eager"
    preview = "\n".join(guidance.preview(state.origin, plan, state.step))
    special = rates.describe(config, plan)
    special = f"learning rate {special}\n" if special else ""
    return (
        f"{state.origin.kind}: {where}; {metrics.parameter_count(arch):,} parameters, {flops / 1e9:.3g} GFLOP a token\n"
        f"{plan.steps:,} steps of {train.batch_tokens:,} tokens: {world.size} x {micro_batches} micro-batches of up to "
        f"{train.micro_batch} x {seq_len}\n"
        f"{preview}\n{special}{pretraining.describe(config, state.origin, plan)}\n"
        f"{world.device}, {precision}{note}, {how}, {state.model.execution}\n"
        f"{state.layout.kind}: {state.layout.why}\n"
        f"{''.join(f'replay: {note}{chr(10)}' for note in replay.notes(state.mixture, state.samples))}"
        f"writes to {config.run.output}"
    )
