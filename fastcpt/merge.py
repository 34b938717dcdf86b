"""Weights after the run: averages of checkpoints, and the way between two models.

An average of checkpoints of one run at a constant rate is what a decay of the rate would have given, if the updates had
been the same ones: with checkpoints t_0 ... t_n, and d_i the mean of the decay from 1 to 0 over the interval before t_i,

    t_0 + sum_i d_i (t_i - t_{i-1})  =  (1 - d_1) t_0 + sum_i (d_i - d_{i+1}) t_i,    d_{n+1} = 0

(WSM, arXiv 2507.17634, theorem 3.1). The decay begins at t_0 and has reached 0 at t_n.
"""

import csv
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastcpt import UserError, evaluation, export, hf, parallel
from fastcpt.evaluation import NamedSet
from fastcpt.parallel import fill_
from fastcpt.weights import Weights, check_alike

Decay = Literal["linear", "cosine", "1-sqrt"]
# Integrals of the decays from 0 to u.
INTEGRALS = {
    "linear": lambda u: u - u * u / 2,
    "cosine": lambda u: (u + math.sin(math.pi * u) / math.pi) / 2,
    "1-sqrt": lambda u: u - 2 / 3 * u**1.5,
}


def decays(steps: Sequence[int], shape: Decay) -> list[float]:
    """The mean of a decay from 1 at the first of n + 1 steps to 0 at the last, over each of the n intervals."""
    first, length = steps[0], steps[-1] - steps[0]
    reached = [(step - first) / length for step in steps]
    integral = INTEGRALS[shape]
    return [(integral(end) - integral(start)) / (end - start) for start, end in pairwise(reached)]


def decay_weights(steps: Sequence[int], shape: Decay) -> list[float]:
    """The weight of the checkpoint of each of the ascending steps, by which their average is the decay's; they sum to 1."""
    factors = [1.0, *decays(steps, shape), 0.0]
    return [before - after for before, after in pairwise(factors)]


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum, fp32, added up in float64."""
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        if weight:  # what counts nothing must not even make a zero negative
            total.add_(tensor.double(), alpha=weight)
    return total.float()


def slerp(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The spherical interpolation (Shoemake 1985) of two tensors as vectors, fp32; on the straight line if they are
    nearly parallel or one is zero, where there is no angle."""
    first, second = (tensor.double() for tensor in tensors)
    cosine = (first * second).sum() / (first.norm() * second.norm())  # NaN if one of them is zero
    angle = float(cosine.clamp(-1, 1).arccos())
    if not math.sin(angle) > 1e-6:
        return linear(tensors, weights)
    scales = [math.sin(weight * angle) / math.sin(angle) for weight in weights]
    return linear(tensors, scales)


def merge(
    sources: Sequence[str],
    output: str,
    method: Literal["linear", "slerp"] = "linear",
    weights: Sequence[float] | None = None,
    decay: Decay | None = None,
    ema: bool = False,
) -> list[tuple[str, float]]:
    """Writes the average of checkpoints, runs or Hugging Face models as a Hugging Face model, a tensor at a time.

    weights: one a source, divided by their sum; equal by default. decay: by `decay_weights`, of the steps of checkpoints.
    ema: of the moving averages of their weights. Returns (source, weight) as it was used.
    """
    if "://" in output:
        raise UserError("output-remote", f"{output}: a URL; name a folder of this machine")
    if len(sources) < 2:
        raise UserError("merge-too-few", f"merge: one model, {sources[0]}; name at least two")
    if method == "slerp" and (len(sources) != 2 or decay):
        raise UserError("merge-slerp-two", "merge: --method slerp takes two models and no --decay; use linear")
    if weights is not None:
        _check_weights(sources, weights)
    models = [Weights.open(source, ema) for source in sources]
    if decay:
        models = _in_order(models)
        weights = decay_weights([model.state["step"] for model in models if model.state], decay)
    check_alike(models)
    weights = weights or [1.0] * len(models)
    shares = [weight / math.fsum(weights) for weight in weights]
    average = slerp if method == "slerp" else linear
    arch = max((model.arch for model in models), key=lambda arch: arch.max_positions)
    card = export.merged_card([(model.source, share) for model, share in zip(models, shares)], method)
    hf.save_tensors(
        lambda name: average([model.tensor(name) for model in models], shares), arch, output,
        next((model.tokenizer for model in models if model.tokenizer), None), models[0].eod,
        files={"README.md": card.encode()},
    )  # fmt: skip
    return [(model.source, share) for model, share in zip(models, shares)]


def _check_weights(sources: Sequence[str], weights: Sequence[float]) -> None:
    if len(weights) != len(sources):
        raise UserError(
            "merge-weights", f"--weights: {len(weights)} numbers for {len(sources)} models; give one for each"
        )
    if not all(map(math.isfinite, weights)) or math.fsum(weights) <= 0:
        raise UserError("merge-weights", f"--weights {list(weights)}: they must be finite and sum to more than 0")


def _in_order(models: list[Weights]) -> list[Weights]:
    """By their steps. A rate that fell already is decayed twice, which is said."""
    for model in models:
        if model.state is None or "step" not in model.state:
            raise UserError(
                "merge-decay-steps", f"--decay: {model.source} is no checkpoint, and has no step; use --weights"
            )
    ordered = sorted(models, key=lambda model: model.state["step"] if model.state else 0)
    steps = [model.state["step"] for model in ordered if model.state]
    if len(set(steps)) < len(steps):
        raise UserError("merge-decay-steps", f"--decay: steps {steps}; give each checkpoint of a run once")
    rates = [model.state["lr"] for model in ordered if model.state]
    if max(rates) > min(rates) * (1 + 1e-9):
        print(
            f"warning: the learning rates of these checkpoints are {', '.join(f'{rate:.3g}' for rate in rates)}: a decay is "
            "emulated of checkpoints at a constant rate (arXiv 2507.17634)",
            file=sys.stderr,
        )
    return ordered


def interpolate(
    base: str, continued: str, points: Sequence[float], sets: Sequence[tuple[str, str, str]],
    seq_len: int, tokens: int | None, micro_batch: int, ema: bool = False,
) -> list[dict[str, float]]:  # fmt: skip
    """The losses of (1 - w) base + w continued at each point w, with what is forgotten and learned since w = 0.

    sets: (name, role, shard set). ema: of the continued model's moving average. Returns a row a point: {"w", "NAME loss",
    "NAME bits/byte", ..., "forgetting" and "adaptation" where there are sets of their roles}.
    """
    if not points or not all(map(math.isfinite, points)):
        raise UserError("option-out-of-range", f"--points {list(points)}: give numbers such as 0 0.5 1")
    opened = evaluation.open_sets(sets, seq_len, tokens, micro_batch)
    ends = [Weights.open(base), Weights.open(continued, ema)]
    check_alike(ends)
    evaluation.check_sets(ends[0], opened)
    world = parallel.start("single")
    model = ends[0].model(world.device)

    def measure(w: float) -> dict[str, dict[str, float]]:
        for name, parameter in model.named_parameters():
            parts = [end.tensor(hf.file_name(name)) for end in ends]
            fill_(parameter, linear(parts, (1 - w, w)))
        return evaluation.evaluate_sets(model, opened, seq_len, micro_batch, world, f"w {w:g} ")

    results = {w: measure(w) for w in dict.fromkeys((0.0, *points))}
    start = {name: entry["loss"] for name, entry in results[0.0].items()}
    return [_row(w, results[w], opened, start) for w in points]


def _row(
    w: float, results: dict[str, dict[str, float]], sets: Sequence[NamedSet], start: dict[str, float]
) -> dict[str, float]:
    row = {"w": w}
    for named in sets:
        row[f"{named.name} loss"] = results[named.name]["loss"]
        row[f"{named.name} bits/byte"] = results[named.name]["bits_per_byte"]
    return row | evaluation.changes(results, start)


def write_csv(path: Path, rows: Sequence[dict[str, float]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
