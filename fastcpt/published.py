"""Published training speeds, beside which the model of `cost.py` is held; a few of them fit its constants.

The form of the model was settled with all rows in sight; its constants, with those marked `fit` alone.

A row is what a project says of its own program on its own machines, with shapes as its configurations have them. Left out
are those of unknown shape or batch (Megatron-LM's and nanotron's ranges), of other arithmetic (fp8), of windows of
attention (nanochat, the newer modded-nanogpt), and the time that "$100K or 100 Days" gives, which would be 99% of peak.
"""

import statistics
from dataclasses import dataclass, replace

from fastcpt.cost import DEVICES, Code, Job, tokens_per_second
from fastcpt.model import Architecture

# Rows of 2 D bytes a token and layer, bytes a logit and an update. Counted for an unfused block: 81 rows, its cross-entropy
# 34 bytes; compiled: 50 and 8; fused by hand: 34 and 6. Attention: flash-attention 1 and Triton's of that time ran at half
# the rate of flash-attention 2 (arXiv 2307.08691); on A100 cuDNN at 0.82 of it (transformers#48163), on H100 at 0.9 of FA3
# (its paper), FA2 there at 0.6.
FUSED_1, UNFUSED = Code(34, 6, 28, attention=0.5), Code(81, 34, 40, attention=0.5)
UNFUSED_HOPPER = replace(UNFUSED, attention=0.3)
LLMC, LLMC_HOPPER = Code(34, 6, 28, attention=0.82), Code(34, 6, 28, attention=0.9)
COMPILED, FUSED_2 = Code(50, 8, 28, attention=0.6), Code(34, 6, 28)
H100_500W = replace(DEVICES["h100"], bandwidth=2.4e12)  # torchtitan's, with 96 GB of HBM2e


@dataclass(frozen=True)
class Row:
    """rate: tokens/s a GPU, as published. fit: this row fits constants, and tests nothing."""

    source: str
    model: str
    device: str
    job: Job
    rate: float
    fit: bool = False

    @property
    def error(self) -> float:
        return tokens_per_second(self.job) / self.rate - 1


def _gpt(layers: int, width: int, heads: int, vocab_size: int = 50304) -> Architecture:
    return Architecture(layers, width, heads, vocab_size=vocab_size)


def _llama(layers: int, width: int, heads: int, keys: int, mlp: int, vocab_size: int) -> Architecture:
    """Of the same FLOPs: three MLP matrices, and keys and values of `keys` columns, as two matrices of another width."""
    return Architecture(layers, width, heads, vocab_size=vocab_size, mlp_width=3 * mlp // 2 - (width - keys))


MPT = {
    "125M": _gpt(12, 768, 12, 50368), "350M": _gpt(24, 1024, 16, 50368), "760M": _gpt(24, 1536, 12, 50368),
    "1B": _gpt(24, 2048, 16, 50368), "3B": _gpt(32, 2560, 20, 50368), "7B": _gpt(32, 4096, 32, 50368),
    "13B": _gpt(40, 5120, 40, 50368),
}  # fmt: skip


def _mpt(
    model: str, device: str, gpus: int, seq_len: int, sequences: int, micro_batches: int, rate: float,
    recompute: float = 0.0, fit: bool = False,
) -> Row:  # fmt: skip
    """llm-foundry scripts/train/benchmarking/README.md: FSDP, batch sizes as given there."""
    code = UNFUSED_HOPPER if device == "h100" else UNFUSED
    tokens = sequences * micro_batches * seq_len
    job = Job(MPT[model], DEVICES[device], seq_len, sequences, tokens, gpus, 8, "fsdp", recompute, code)
    return Row("llm-foundry", f"MPT {model}", device, job, rate, fit)


def _flash(model: str, arch: Architecture, batch: int, rate: float, fit: bool = False) -> Row:
    """flash-attention training/README.md: DDP on 8 A100; batches of 0.5M and 1M tokens."""
    job = Job(arch, DEVICES["a100"], 2048, 16, batch / 8, 8, 8, "ddp", 0.0, FUSED_1)
    return Row("flash-attention", f"GPT-3 {model}", "a100", job, rate / 8, fit)


def _llmc(
    model: str, arch: Architecture, device: str, sequences: int, batch: int, rate: float, fit: bool = False
) -> Row:
    """llm.c scripts/*.sh and the records of modded-nanogpt: ZeRO-1 on 8 GPUs."""
    code = LLMC_HOPPER if device == "h100" else LLMC
    job = Job(arch, DEVICES[device], 1024, sequences, batch / 8, 8, 8, "zero1", 0.0, code)
    return Row("llm.c", f"GPT-2 {model}", device, job, rate, fit)


def _pythia(name: str, arch: Architecture, gpus: int, hours: float) -> Row:
    """Pythia paper (arXiv 2304.01373), GPU-hours of 300B tokens; GPT-NeoX with ZeRO-1, all of it recomputed.

    That of 1B is also in TinyLlama's README; the others were not looked up again, nor how many GPUs shared a copy."""
    job = Job(arch, DEVICES["a100-40"], 2048, 8, 1024 * 2048 / gpus, gpus, 8, "zero1", 1.0, UNFUSED)
    return Row("Pythia paper", name, "a100-40", job, 300e9 / hours / 3600)


_SMALL = _gpt(12, 768, 12)
ROWS = [
    _flash("125M", _gpt(12, 768, 12, 50264), 2**19, 1310e3),
    _flash("355M", _gpt(24, 1024, 16, 50264), 2**19, 503e3),
    _flash("760M", _gpt(24, 1536, 16, 50264), 2**19, 245e3),
    _flash("1.3B", _gpt(24, 2048, 16, 50264), 2**20, 169e3),
    _flash("2.7B", _gpt(32, 2560, 20, 50264), 2**20, 85e3),
    _mpt("125M", "a100", 8, 2048, 40, 2, 142830),
    _mpt("350M", "a100", 8, 2048, 32, 2, 58782, fit=True),
    _mpt("350M", "a100", 8, 512, 128, 2, 69330),
    _mpt("350M", "a100", 8, 8192, 8, 2, 36569),
    _mpt("760M", "a100", 8, 2048, 24, 2, 32434),
    _mpt("1B", "a100", 8, 2048, 14, 4, 20513),
    _mpt("3B", "a100", 8, 2048, 10, 2, 10811),
    _mpt("7B", "a100", 8, 2048, 6, 2, 4641, fit=True),
    _mpt("7B", "a100", 8, 8192, 8, 2, 3206, 1.0),
    _mpt("13B", "a100", 8, 2048, 2, 3, 2262),
    _mpt("13B", "a100", 8, 4096, 10, 3, 2060, 1.0),
    _mpt("3B", "a100-40", 64, 2048, 6, 1, 9736),
    _mpt("3B", "a100-40", 128, 2048, 6, 1, 9538),
    _mpt("7B", "a100-40", 8, 2048, 12, 4, 3679, 1.0),
    _mpt("7B", "a100-40", 32, 2048, 18, 1, 3725, 1.0),
    _mpt("7B", "a100-40", 128, 2048, 18, 1, 3623, 1.0),
    _mpt("13B", "a100-40", 16, 2048, 10, 1, 1993, 1.0),
    _mpt("13B", "a100-40", 128, 2048, 16, 1, 1972, 1.0),
    _mpt("760M", "h100", 8, 2048, 24, 2, 63147),
    _mpt("760M", "h100", 16, 2048, 24, 1, 68551),
    _mpt("1B", "h100", 8, 2048, 14, 1, 45455, fit=True),
    _mpt("1B", "h100", 64, 2048, 20, 1, 44402, fit=True),
    _mpt("3B", "h100", 16, 2048, 10, 3, 24142),
    _mpt("3B", "h100", 64, 2048, 6, 3, 22525),
    _mpt("7B", "h100", 8, 2048, 6, 1, 10643),
    _mpt("7B", "h100", 8, 4096, 16, 2, 8611, 1.0),
    _mpt("13B", "h100", 8, 2048, 2, 1, 4792),
    _mpt("13B", "h100", 64, 2048, 2, 1, 4800),
    _llmc("124M", _SMALL, "a100", 64, 2**19, 218e3, fit=True),
    _llmc("350M", _gpt(24, 1024, 16), "a100", 64, 2**19, 79.9e3),
    _llmc("774M", _gpt(36, 1280, 20), "a100", 32, 2**19, 38.6e3, fit=True),
    _llmc("124M", _SMALL, "h100", 64, 2**19, 468e3),
    _llmc("350M", _gpt(24, 1024, 16), "h100", 64, 2**19, 188e3),
    _llmc("1558M", _gpt(48, 1600, 25), "h100", 16, 2**20, 46.8e3, fit=True),
    Row("modded-nanogpt 2024-11-08", "124M", "h100",
        Job(_gpt(12, 768, 6), DEVICES["h100"], 1024, 64, 2**16, 8, 8, "ddp", 0.0, COMPILED), 453e3),
    *(
        Row("torchtitan", "Llama 3.1 8B", "h100 500 W",
            Job(_llama(32, 4096, 32, 1024, 14336, 128256), H100_500W, 8192, 2, 2 * 8192, gpus, 8, "fsdp", 0.5, COMPILED), rate)
        for gpus, rate in ((8, 6667), (128, 6514))
    ),
    Row("TinyLlama", "1.1B", "a100-40",
        Job(_llama(22, 2048, 32, 256, 5632, 32000), DEVICES["a100-40"], 2048, 8, 2**17, 16, 8, "fsdp", 0.0, FUSED_2), 24e3),
    _pythia("Pythia 410M", _gpt(24, 1024, 16), 32, 2540),
    _pythia("Pythia 1B", _gpt(16, 2048, 8), 64, 4830),
    _pythia("Pythia 1.4B", _gpt(24, 2048, 16), 64, 7120),
    _pythia("Pythia 2.8B", _gpt(32, 2560, 32), 64, 14240),
    _pythia("Pythia 6.9B", _gpt(32, 4096, 32, 50432), 128, 33500),
    _pythia("Pythia 12B", _gpt(36, 5120, 40, 50688), 256, 72300),
]  # fmt: skip


def summary() -> str:
    """The errors of the rows that fit nothing, in one sentence."""
    errors = [abs(row.error) for row in ROWS if not row.fit]
    return (
        f"the same model is off by {statistics.median(errors):.0%} in the median of {len(errors)} published runs that fit "
        f"none of it, {statistics.mean(errors):.0%} in the mean, {max(errors):.0%} at worst"
    )
