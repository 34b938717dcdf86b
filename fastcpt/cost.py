"""How long a step takes on a GPU, on paper: an explicit model, held against published runs (`published.py`).

Seconds of one process in one step, with D the width, L layers, T tokens a sequence, V the vocabulary, P parameters:

    matmul         FLOPs of `metrics.flops_per_token` without attention, at rate R and a share 1 / (1 + WRITES peak / (B D))
                   of it: that of the time of a product with inner width D in which its result does not go to memory, with
                   bandwidth B. R is what the best product reaches (published), times `sustained`
    attention      7 L D T FLOPs a token: causal, forward once and backward 2.5 times; at the published rate of a kernel
                   for its head width, times T / (T + 512): blocks on the diagonal are half empty
    elementwise    `rows` times 2 D bytes a token and layer, and the casts and sums of gradients, CASTS bytes a parameter
                   and micro-batch, at HBM of the bandwidth
    logits         `logit` bytes for each of V logits a token
    optimizer      `update` bytes a parameter that the process holds
    communication  what does not hide behind OVERLAP of the arithmetic beside it: that of a micro-batch (shards), or of
                   the last backward pass (gradients). At LINK of what NVLink has, or of all network cards of a machine
                   together where those are less: a ring enters and leaves a machine once for all its GPUs
    waiting        WAITING of all the above for each doubling of the machines: the slowest sets the pace

Recomputing blocks adds their forward pass. WRITES, WAITING and `sustained` are fitted, on the rows of `published.py` that
say so; all else is published or, where said, assumed. Of this project nothing has been measured on a GPU.
"""

import math
from dataclasses import dataclass, replace

from fastcpt import layout, memory, metrics
from fastcpt.config import Count, Train
from fastcpt.model import PRESETS, Architecture
from fastcpt.progress import short_count, short_time

WRITES, WAITING = 0.14, 0.005  # fitted
HBM = 0.9  # quack's softmax, cross-entropy and RMSNorm: 3.0 to 3.2 of an H100's 3.35 TB/s
LINK, OVERLAP = 0.8, 0.9  # assumed
CASTS = 6, 12  # bytes a parameter and micro-batch: to bf16 (4 + 2); gradients summed in fp32 (4 + 4 + 4), of the share


@dataclass(frozen=True)
class Device:
    """Dense bf16 `peak` and the best `matmul`, FLOP/s; `memory`, bytes; bytes/s of its memory, of NVLink and of its
    network card, one direction; attention forward and backward, FLOP/s at heads of 64 and 128, causal, T = 2048;
    sustained: of the best product, over a training step: fitted."""

    peak: float
    matmul: float
    memory: float
    bandwidth: float
    link: float
    card: float
    attention: tuple[float, float]
    sustained: float


# Peaks, memory, bandwidths and cards: NVIDIA's data sheets of the chips (SXM) and of DGX machines. Best products: MAMF of
# stas00/ml-engineering. Attention: flash-attention 2's charts on A100; elsewhere the published forward rates of FA3
# (arXiv 2407.08608) and of FA4 (flash-attention#2605), times what FA2 keeps of its own with the backward pass, 0.885.
# Assumed: an H200 multiplies as an H100 does, and a B200 sustains of its best product what an H100 does.
DEVICES = {
    "a100-40": Device(312e12, 271.2e12, 40e9, 1.555e12, 300e9, 25e9, (140e12, 155e12), 0.85),
    "a100": Device(312e12, 271.2e12, 80e9, 2.039e12, 300e9, 25e9, (140e12, 155e12), 0.85),
    "h100": Device(989e12, 794.5e12, 80e9, 3.35e12, 450e9, 50e9, (328e12, 461e12), 0.73),
    "h200": Device(989e12, 794.5e12, 141e9, 4.8e12, 450e9, 50e9, (328e12, 461e12), 0.73),
    "b200": Device(2250e12, 1745e12, 180e9, 8.0e12, 900e9, 50e9, (619e12, 1002e12), 0.73),
}


@dataclass(frozen=True)
class Code:
    """Bytes that a program moves: rows of 2 D bytes a token and layer, a logit, a parameter and update. attention: its
    rate, of the device's."""

    rows: float
    logit: float
    update: float
    attention: float = 1.0


# As counted in benchmarks/results/kernels_traffic.csv: norms 6.0 + 5.5, rotation 1.1 + 6.1, GELU 8.0 + 12.1 rows; and the
# gradients of the other biases, 5 rows read.
OURS = Code(rows=43.8, logit=4, update=32)
OURS_BF16_MOMENTS = replace(OURS, update=24)


@dataclass(frozen=True)
class Job:
    """sequences: of a micro-batch; step_tokens: of a process in a step; machine: processes on each machine; recompute: of
    the blocks' forward pass, 0 to 1."""

    arch: Architecture
    device: Device
    seq_len: int
    sequences: int
    step_tokens: float
    processes: int = 1
    machine: int = 8
    kind: str = "ddp"  # or single, fsdp, hsdp, zero1 (moments in shards; gradients and weights in bf16)
    recompute: float = 0.0
    code: Code = OURS


def attention_rate(job: Job) -> float:
    """FLOP/s of attention, forward and backward. Between heads of 64 and 128 along a line; below, in proportion."""
    narrow, wide = job.device.attention
    width = job.arch.head_width
    rate = narrow * width / 64 if width < 64 else narrow + (wide - narrow) * min(1, width / 64 - 1)
    return job.code.attention * rate * job.seq_len / (job.seq_len + 512) / (2048 / (2048 + 512))


def step_seconds(job: Job) -> dict[str, float]:
    """The parts of a step of one process, by name; the step takes their sum."""
    arch, device, code = job.arch, job.device, job.code
    full, causal = (metrics.flops_per_token(arch, job.seq_len, halved) for halved in (False, True))
    products, attended = full - 2 * (full - causal), 7 / 6 * (full - causal)
    blocks = products - 6 * arch.vocab_size * arch.width
    parameters, tokens = metrics.parameter_count(arch), job.step_tokens
    micro = min(job.sequences * job.seq_len, tokens)
    moved = HBM * device.bandwidth
    shards = {"fsdp": job.processes, "zero1": job.processes, "hsdp": job.machine}.get(job.kind, 1)
    whole, share = CASTS[0] * parameters, CASTS[1] * parameters / (1 if job.kind == "zero1" else shards)

    rate = device.matmul * device.sustained / (1 + WRITES * device.peak / device.bandwidth / arch.width)
    rows = arch.layers * code.rows * 2 * arch.width
    parts = {
        "matmul": tokens * (products + job.recompute * blocks / 3) / rate,
        "attention": tokens * attended * (1 + job.recompute / 3.5) / attention_rate(job),
        "elementwise": (tokens * rows * (1 + job.recompute / 3) + tokens / micro * (whole + share)) / moved,
        "logits": tokens * code.logit * arch.vocab_size / moved,
        "optimizer": code.update * parameters / shards / moved,
    }
    arithmetic = sum(parts.values()) - parts["optimizer"]
    parts["communication"] = _exposed(job, arithmetic * micro / tokens, tokens / micro)
    machines = max(1.0, job.processes / job.machine)
    parts["waiting"] = WAITING * math.log2(machines) * sum(parts.values())
    return parts


def _ring(bytes_: float, processes: float, bandwidth: float) -> float:
    """Seconds of an all-gather or a reduce-scatter of a tensor of so many bytes."""
    return bytes_ * (processes - 1) / processes / (LINK * bandwidth)


def _exposed(job: Job, micro_seconds: float, micro_batches: float) -> float:
    """Seconds of a step's communication that do not hide. micro_seconds: arithmetic of a micro-batch, of which a backward
    pass is two thirds."""
    device, parameters = job.device, metrics.parameter_count(job.arch)
    across = min(device.link, job.machine * device.card)
    reach = across if job.processes > job.machine else device.link
    backward, hidden = OVERLAP * micro_seconds * 2 / 3, OVERLAP * micro_seconds
    if job.processes == 1:
        return 0.0
    if job.kind == "ddp":  # gradients in fp32, reduced and handed on
        return max(0.0, 2 * _ring(4 * parameters, job.processes, reach) - backward)
    if job.kind == "zero1":
        return max(0.0, 2 * _ring(2 * parameters, job.processes, reach) - backward)
    within, bandwidth = (job.processes, reach) if job.kind == "fsdp" else (job.machine, device.link)
    # Gathered in bf16 for each pass, reduced in fp32.
    each = 2 * _ring(2 * parameters, within, bandwidth) + _ring(4 * parameters, within, bandwidth)
    seconds = micro_batches * max(0.0, each - hidden)
    if job.kind == "hsdp":  # a shard's gradients, each over its own card
        copies = job.processes / job.machine
        seconds += max(0.0, 2 * _ring(4 * parameters / job.machine, copies, device.card) - backward)
    return seconds


def tokens_per_second(job: Job) -> float:
    """Of one process."""
    return job.step_tokens / sum(step_seconds(job).values())


def mfu(job: Job) -> float:
    """Of the data sheet's peak, attention counted as full."""
    return tokens_per_second(job) * metrics.flops_per_token(job.arch, job.seq_len) / job.device.peak


def describe(job: Job, device: str, tokens: int, evaluation: float, price: float | None) -> dict[str, str]:
    """For people: speed, time and cost of so many tokens, and the parts of a step. evaluation: its compute, of training's;
    price: of a GPU-hour."""
    parts, rate = step_seconds(job), tokens_per_second(job)
    step = sum(parts.values())
    causal = rate * metrics.flops_per_token(job.arch, job.seq_len, causal=True) / job.device.peak
    seconds = tokens / (rate * job.processes) * (1 + evaluation)
    hours = seconds / 3600 * job.processes
    money = "" if price is None else f"; {hours * price:,.2f} at {price:g} a GPU-hour"
    shares = sorted(((part / step, name) for name, part in parts.items() if part > 0.001 * step), reverse=True)
    return {
        "speed": f"{job.processes} x {device}: {short_count(rate * job.processes)} tokens/s, {rate:,.0f} each; "
        f"MFU {mfu(job):.1%} with attention counted as full, {causal:.1%} as causal",
        "time": f"{short_time(seconds)} with evaluation, {hours:,.1f} GPU-hours{money}",
        "step": f"{step:.3g} s: {', '.join(f'{name} {share:.1%}' for share, name in shares)}",
    }


TABLE_TOKENS, TABLE_SEQ_LEN, TABLE_GPUS = 2_097_152, 2048, (1, 8, 64, 512)  # Pythia's batch and length


def planned(arch: Architecture, device: Device, gpus: int) -> Job | None:
    """A run with Pythia's batch: of the micro-batches of at most 16 sequences the largest that fits without recomputation
    in the simplest layout (ddp, hsdp, fsdp). None if nothing fits."""
    train = Train(tokens=Count(1), batch_tokens=Count(1), recompute="none")
    machine, share = min(gpus, 8), TABLE_TOKENS // TABLE_SEQ_LEN // gpus
    for sequences in (16, 8, 4, 2, 1):
        if sequences > share:
            continue

        def needed(shards: int, recompute: bool, sequences: int = sequences) -> int:
            ddp = shards == 1 and gpus > 1
            return sum(
                memory.parts(
                    arch,
                    sequences,
                    TABLE_SEQ_LEN,
                    True,
                    False,
                    kernels=True,
                    shards=shards,
                    recompute=recompute,
                    ddp=ddp,
                ).values()
            )

        kind, _, why = layout.choose(train, gpus, machine, needed, int(device.memory))
        if "does not fit" not in why:
            return Job(arch, device, TABLE_SEQ_LEN, sequences, TABLE_TOKENS / gpus, gpus, machine, kind)
    return None


def table() -> list[str]:
    """Tokens/s a GPU and MFU of each Pythia on each device, and GPU-hours of its 300B tokens on 8, as lines of text."""
    heads = [f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in TABLE_GPUS]
    lines = [f"{'tokens/s a GPU, MFU':<20}" + "".join(f"{head:>16}" for head in heads) + f"{'GPU-hours, 300B':>16}"]
    for name, arch in PRESETS.items():
        for label, device in DEVICES.items():
            jobs = [planned(arch, device, gpus) for gpus in TABLE_GPUS]
            cells = [f"{tokens_per_second(job):,.0f} {mfu(job):>4.0%}" if job else "-" for job in jobs]
            cells.append(f"{300e9 / tokens_per_second(jobs[1]) / 3600:,.0f}" if jobs[1] else "-")
            lines.append(f"{name:<12}{label:<8}" + "".join(f"{cell:>16}" for cell in cells))
    return lines
