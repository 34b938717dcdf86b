"""What a run reports: FLOPs, MFU, memory, and where the numbers go. The arithmetic is pure functions with tests."""

import json
import math
import os
import resource
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from fastcpt.config import Run
from fastcpt.model import Architecture
from fastcpt.progress import Bar, short_count, short_time

Batch = TypeVar("Batch")

# Dense bf16 peaks, FLOP/s, from NVIDIA's data sheets; the first name that the device's name contains counts.
BF16_PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
# Fields that say how fast, not what: exempt where two runs must be the same.
TIMING_FIELDS = {"seconds", "tokens_per_second", "mfu", "eta_seconds", "peak_memory_bytes"}


def flops_per_token(arch: Architecture, seq_len: int, causal: bool = False) -> float:
    """FLOPs a trained token, forward and backward: 6 for each weight of a matrix product plus 12 L D T of attention.

    The input embedding is a look-up and counts nothing. causal=False counts attention as full, the convention of the
    PaLM paper (arXiv 2204.02311, appendix B); causal=True halves it, as causal kernels do.
    """
    matrices = arch.layers * (4 * arch.width**2 + 2 * arch.width * arch.mlp_width) + arch.vocab_size * arch.width
    attention = 12 * arch.layers * arch.width * seq_len
    return 6 * matrices + (attention / 2 if causal else attention)


def parameter_count(arch: Architecture) -> int:
    """Parameters, both embeddings and biases included."""
    width, mlp = arch.width, arch.mlp_width
    block = 4 * width * width + 2 * width * mlp + (3 * width + width) + (mlp + width) + 4 * width
    return arch.layers * block + 2 * width + 2 * arch.vocab_size * width


def measured_matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    """The best rate of a square matrix product in this process, FLOP/s."""
    a, b = torch.ones(size, size, device=device, dtype=dtype), torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):
        started = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def peak_flops(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """The denominator of MFU, FLOP/s: a GPU's data sheet for bf16, else what a matrix product reaches here and now, the best
    of `repeats`."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in BF16_PEAKS.items():
            if known in name:
                return peak
    return measured_matmul_rate(device, dtype, 4096 if device.type == "cuda" else 1024, repeats)


class Logger(Protocol):
    """Receives the lines of `metrics.jsonl`."""

    def log(self, line: dict[str, Any]) -> None: ...

    def sync(self) -> None:
        """Makes what was logged durable: called before a checkpoint is committed."""

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`: one object a line. On start it is cut back to the step that the run goes on from.

    evaluated: false if that step's evaluation has yet to be done: what was written of it is cut off too.
    """

    def __init__(self, path: Path, step: int | None, evaluated: bool = True) -> None:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        kept = [line for line in lines if _is_kept(line, step, evaluated)]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)

    def log(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(_writable(line), allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _writable(value: Any) -> Any:
    """Numbers that are not finite, such as a skipped step's gradient norm, as null: JSON cannot say them."""
    if isinstance(value, dict):
        return {key: _writable(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_kept(line: bytes, step: int | None, evaluated: bool) -> bool:
    """A whole line of a step up to `step`; a line that a kill cut short is not JSON."""
    try:
        value = json.loads(line)
        evaluation = "eval" in value or value.get("event", {}).get("of") == "evaluation"  # the line, or its alarms
        return step is not None and value["step"] <= step and (evaluated or value["step"] < step or not evaluation)
    except ValueError:
        return False


def has_evaluation(path: Path, step: int) -> bool:
    """Whether a `metrics.jsonl` has the evaluation of a step."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return any(b'"eval"' in line and _is_kept(line, step, True) and json.loads(line)["step"] == step for line in lines)


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """A line's numbers under flat names: eval/pile/loss for {"eval": {"pile": {"loss": ...}}}.

    Without those that are not finite, which are null in `metrics.jsonl`: all logs hold the same numbers.
    """
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{name}": number for name, number in scalars(value).items()}
        elif isinstance(value, int | float) and math.isfinite(value) and key not in ("step", "tokens"):
            flat[key] = value
    return flat


class TensorBoard:
    """TensorBoard events under the same names; events after the step that the run goes on from are purged."""

    def __init__(self, directory: Path, step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=0 if step is None else step + 1)

    def log(self, line: dict[str, Any]) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases under the same names; the same W&B run goes on after a restart.

    A run that goes on from a checkpoint logs again what it had logged after it, and W&B drops steps that go backwards.
    Its means to take them back, `resume_from` (rewind), is a private preview that only some servers have; steps of our
    own (`define_metric`) would draw them twice. So W&B keeps the lines that it has, which the resumed run computes again
    as they were, and is sent those that it lacks. It lacks what a kill kept it from sending, too: W&B writes and sends
    every 15 s, a checkpoint may be younger. Such lines are read from `metrics.jsonl`, which is made durable first.

    Offline, W&B starts a folder for each start and knows nothing of the earlier ones, so the newest holds all lines
    of the run: `wandb sync RUN/wandb/latest-run` is enough.
    """

    def __init__(self, project: str, directory: Path, config: dict[str, Any], step: int | None) -> None:
        import wandb

        remembered = directory / "wandb-id"
        if step is None or not remembered.exists():
            remembered.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(project=project, id=remembered.read_text(), resume="allow", dir=directory, config=config)
        lines = directory / "metrics.jsonl"  # cut back to `step` already: `open_loggers` opens it first
        for line in lines.read_bytes().splitlines() if step is not None and lines.exists() else ():
            self.log(json.loads(line))

    def log(self, line: dict[str, Any]) -> None:
        if line["step"] >= self._run.starting_step:  # the first that the server does not have
            self._run.log(scalars(line) | {"tokens": line["tokens"]}, step=line["step"])

    def sync(self) -> None: ...

    def close(self) -> None:
        self._run.finish()


def open_loggers(run: Run, config: dict[str, Any], step: int | None, evaluated: bool = True) -> list[Logger]:
    """The loggers that a run asks for. step: where it goes on from, None for a new run: later lines are cut off."""
    folder = Path(run.output)
    loggers: list[Logger] = [JsonLines(folder / "metrics.jsonl", step, evaluated)]
    if run.tensorboard:
        loggers.append(TensorBoard(folder / "tensorboard", step))
    if run.wandb:
        loggers.append(WandB(run.wandb, folder, config, step))
    return loggers


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, else the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def console_line(line: dict[str, Any], total_steps: int) -> str:
    """One training, evaluation or event line for people."""
    head = f"step {line['step']:>{len(str(total_steps))}}/{total_steps}  {short_count(line['tokens']):>6} tokens"
    if "eval" in line:
        sets = "  ".join(
            f"{name} {entry['loss']:.4f} ({entry['bits_per_byte']:.4f} bits/byte)"
            for name, entry in line["eval"].items()
        )
        changes = "".join(f"  {name} {line[name]:+.4f}" for name in ("forgetting", "adaptation") if name in line)
        average = "".join(f"  {name} {entry['loss']:.4f} (ema)" for name, entry in line.get("ema", {}).items())
        return f"{head}  eval  {sets}{changes}{average}"
    if "event" in line:
        event = line["event"]
        if event["kind"] == "alarm":
            return f"{head}  alarm: {event['text']}"
        first, end = event["samples"]
        who = "".join(f", rank {rank}" for rank in event["ranks"])
        bad = f"; the loss of {event['not_finite']} is not finite{who}" if event["not_finite"] else ""
        return f"{head}  skipped ({event['kind']}): samples {first} to {end - 1}{bad}"
    skipped = f"  skipped {line['skipped']}" if line["skipped"] else ""
    return (
        f"{head}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  grad {line['grad_norm']:.3f}"
        f"  {short_count(line['tokens_per_second'])} tokens/s  MFU {100 * line['mfu']:.1f}%"
        f"  {short_time(line['eta_seconds'])} left{skipped}"
    )


class Console:
    """The run as a person sees it: each line as text and, on a terminal, a bar below them (`progress.py`).

    last_step, batch_tokens: of the run. shown: false on all processes but the first, where it says nothing.
    """

    def __init__(self, last_step: int, batch_tokens: int, shown: bool = True) -> None:
        self._last_step, self._batch_tokens, self._shown = last_step, batch_tokens, shown
        self._bar = Bar("train", last_step, quiet=not shown)
        self._line: dict[str, Any] | None = None

    def log(self, line: dict[str, Any]) -> None:
        """A training, evaluation or event line."""
        if not self._shown:
            return
        if "loss" in line:
            self._line = line
        self._bar.print(console_line(line, self._last_step))

    def print(self, *texts: str) -> None:
        for text in texts if self._shown else ():
            self._bar.print(text)

    def follow(self, batches: Iterable[Batch], step: int) -> Iterator[Batch]:
        """Hands the batches on, the first being that of the step after `step`, and moves the bar with each.

        The bar goes away when the batches end, and also when the loop over them is left by an exception: that ends
        this generator, in the loop's own frame, before anybody can print a message.
        """
        with self._bar:
            self._update(step)
            for done, batch in enumerate(batches, step + 1):
                yield batch
                self._update(done)

    def busy(self, step: int, what: str) -> None:
        """Says what keeps the run from its next step."""
        self._update(step, what)

    def _update(self, step: int, what: str = "") -> None:
        self._bar.update(step, self._text(step) + (f"  {what}" if what else ""), now=bool(what))

    def _text(self, step: int) -> str:
        """Of this step, and the loss and the rate of the last line: nothing here waits for the device."""
        text = f"{step:,}/{self._last_step:,}"
        if self._line is None:
            return text
        rate = self._line["tokens_per_second"]
        left = (self._last_step - step) * self._batch_tokens / rate
        tokens = self._line["tokens"] + (step - self._line["step"]) * self._batch_tokens
        return (
            f"{text}  {short_time(left)} left  loss {self._line['loss']:.4f}"
            f"  {short_count(tokens)} tokens  {short_count(rate)} tokens/s"
        )
