"""What a run reports: FLOPs, MFU, memory, and where the numbers go. The arithmetic is pure functions with tests."""

import json
import math
import os
import resource
import time
import uuid
from pathlib import Path
from typing import Any, Protocol

import torch

from fastcpt.config import Run
from fastcpt.model import Architecture

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


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The denominator of MFU, FLOP/s: a GPU's data sheet for bf16, else what a matrix product reaches here and now."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in BF16_PEAKS.items():
            if known in name:
                return peak
    return measured_matmul_rate(device, dtype, size=4096 if device.type == "cuda" else 1024)


class Logger(Protocol):
    """Receives the lines of `metrics.jsonl`."""

    def log(self, line: dict[str, Any]) -> None: ...

    def sync(self) -> None:
        """Makes what was logged durable: called before a checkpoint is committed."""

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`: one object a line. On start it is cut back to the step that the run goes on from."""

    def __init__(self, path: Path, step: int | None) -> None:
        kept = [line for line in path.read_bytes().split(b"\n") if _is_kept(line, step)] if path.exists() else []
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)

    def log(self, line: dict[str, Any]) -> None:
        # A skipped step's gradient norm is not finite, which JSON cannot say.
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
        }
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _is_kept(line: bytes, step: int | None) -> bool:
    """A whole line of a step up to `step`; a line that a kill cut short is not JSON."""
    try:
        return step is not None and json.loads(line)["step"] <= step
    except ValueError:
        return False


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """A line's numbers under flat names: eval/pile/loss for {"eval": {"pile": {"loss": ...}}}."""
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{name}": number for name, number in scalars(value).items()}
        elif isinstance(value, int | float) and key not in ("step", "tokens"):
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
    """Weights & Biases; the same W&B run goes on after a restart."""

    def __init__(self, project: str, directory: Path, config: dict[str, Any], step: int | None) -> None:
        import wandb

        remembered = directory / "wandb-id"
        if step is None or not remembered.exists():
            remembered.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(project=project, id=remembered.read_text(), resume="allow", dir=directory, config=config)

    def log(self, line: dict[str, Any]) -> None:
        self._run.log(scalars(line) | {"tokens": line["tokens"]}, step=line["step"])

    def sync(self) -> None: ...

    def close(self) -> None:
        self._run.finish()


def open_loggers(run: Run, config: dict[str, Any], step: int | None) -> list[Logger]:
    """The loggers that a run asks for. step: where it goes on from, None for a new run: later lines are cut off."""
    folder = Path(run.output)
    loggers: list[Logger] = [JsonLines(folder / "metrics.jsonl", step)]
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
    """One training or evaluation line for people."""
    head = f"step {line['step']:>{len(str(total_steps))}}/{total_steps}  {short_count(line['tokens']):>6} tokens"
    if "eval" in line:
        sets = "  ".join(
            f"{name} {entry['loss']:.4f} ({entry['bits_per_byte']:.4f} bits/byte)"
            for name, entry in line["eval"].items()
        )
        changes = "".join(f"  {name} {line[name]:+.4f}" for name in ("forgetting", "adaptation") if name in line)
        return f"{head}  eval  {sets}{changes}"
    skipped = f"  skipped {line['skipped']}" if line["skipped"] else ""
    return (
        f"{head}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  grad {line['grad_norm']:.3f}"
        f"  {short_count(line['tokens_per_second'])} tokens/s  MFU {100 * line['mfu']:.1f}%"
        f"  {short_time(line['eta_seconds'])} left{skipped}"
    )


def short_count(value: float) -> str:
    """Three digits and a unit; what rounds up to 1000 of a unit is 1 of the next."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def short_time(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02}h"
    return f"{hours}h{minutes % 60:02}m" if hours else f"{minutes}m{int(seconds) % 60:02}s"
