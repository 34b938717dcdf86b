"""The arithmetic of metrics against published and counted numbers, the log files against their own readers."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastcpt.config import Run
from fastcpt.metrics import (
    JsonLines,
    TensorBoard,
    WandB,
    console_line,
    flops_per_token,
    measured_matmul_rate,
    open_loggers,
    parameter_count,
    peak_flops,
    peak_memory,
    scalars,
    short_count,
    short_time,
)
from fastcpt.model import PRESETS, Architecture, GPTNeoX

# FORMATS.md, 4.4: GFLOP a token at 2048 tokens a sequence, full attention, as printed there.
GIGAFLOPS = {
    "pythia-14m": "0.06",
    "pythia-31m": "0.14",
    "pythia-70m": "0.34",
    "pythia-160m": "0.97",
    "pythia-410m": "2.72",
    "pythia-1b": "6.26",
    "pythia-1.4b": "9.07",
    "pythia-2.8b": "17.89",
    "pythia-6.9b": "43.1",
    "pythia-12b": "74.0",
}


def test_flops_are_those_of_the_literature() -> None:
    assert GIGAFLOPS.keys() == PRESETS.keys()
    for name, printed in GIGAFLOPS.items():
        digits = len(printed.partition(".")[2])
        assert f"{flops_per_token(PRESETS[name], 2048) / 1e9:.{digits}f}" == printed, name
    pythia = PRESETS["pythia-410m"]  # PERFORMANCE.md: conventions (a) and (b)
    assert flops_per_token(pythia, 2048) == pytest.approx(2.725e9, abs=0.0005e9)
    assert flops_per_token(pythia, 2048, causal=True) == pytest.approx(2.423e9, abs=0.0005e9)


def test_flops_are_those_that_torch_counts() -> None:
    """torch's counter adds up every matrix product of a forward and a backward pass. Attention runs unfused, as the
    convention counts it: in full."""
    arch = Architecture(3, 40, 5, vocab_size=131, mlp_width=77, rotary_fraction=0.5)
    model = GPTNeoX(arch)
    tokens = torch.randint(0, 131, (2, 38))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens[:, :-1], tokens[:, 1:].contiguous()).sum().backward()
    assert counter.get_total_flops() == flops_per_token(arch, 37) * 2 * 37


@pytest.mark.parametrize(
    "arch",
    [*PRESETS.values(), Architecture(3, 40, 5, 131, mlp_width=77, rotary_fraction=0.5, parallel_residual=False)],
    ids=[*PRESETS, "odd"],
)
def test_parameter_count_is_what_the_model_has(arch: Architecture) -> None:
    with torch.device("meta"):
        model = GPTNeoX(arch)
    assert parameter_count(arch) == sum(parameter.numel() for parameter in model.parameters())


def test_measured_rate_is_a_rate() -> None:
    rate = measured_matmul_rate(torch.device("cpu"), torch.float32, size=128, repeats=2)
    assert 0 < rate < math.inf
    assert 0 < peak_flops(torch.device("cpu"), torch.float32) < math.inf


def test_peak_of_a_gpu_is_its_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(device, torch.bfloat16) == peak


def test_peak_memory_is_that_of_the_kernel_in_bytes() -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    highest = int(status["VmHWM"].removesuffix("kB")) * 1024
    # The kernel adds pages up in batches, and getrusage counts the time before this program was loaded too.
    assert 0.9 * highest <= peak_memory(torch.device("cpu")) <= 20 * highest


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, steps: list[int], torn: str = "") -> None:
    path.write_text("".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in steps) + torn)


@pytest.mark.parametrize(
    ("torn", "kept"),
    [
        ("", [0, 10, 20, 30]),
        ('{"step": 30, "lo', [0, 10, 20, 30]),
        ('{"step": 3', [0, 10, 20, 30]),
        ("{", [0, 10, 20, 30]),
        ('{"step": 30, "loss": "\xff', [0, 10, 20, 30]),
        ('{"step": 29, "loss": 1.0}', [0, 10, 20, 30, 29]),  # whole, only its newline is missing
    ],
)
def test_json_lines_go_on_where_the_checkpoint_is(tmp_path: Path, torn: str, kept: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [0, 10, 20, 30, 40, 50])
    path.write_bytes(path.read_bytes() + torn.encode("latin-1"))
    logger = JsonLines(path, step=30)
    assert [line["step"] for line in lines_of(path)] == kept, "cut back at once, not with the first line"
    logger.log({"step": 40, "loss": 0.125})
    logger.sync()
    assert lines_of(path)[-1] == {"step": 40, "loss": 0.125}, "on disk before it is closed"
    logger.close()
    assert [line["step"] for line in lines_of(path)] == [*kept, 40]
    assert sorted(tmp_path.iterdir()) == [path]


def test_json_lines_that_stay_are_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = '{"loss":1.10, "step":  5,"ü": "é"}\n'
    path.write_text(text + '{"step": 6}\n')
    JsonLines(path, step=5).close()
    assert path.read_text() == text


def test_json_lines_say_null_for_what_is_not_finite(tmp_path: Path) -> None:
    logger = JsonLines(tmp_path / "metrics.jsonl", step=None)
    logger.log({"step": 1, "grad_norm": float("nan"), "eval": {"a": {"loss": float("inf"), "tokens": 3}}})
    logger.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert line == {"step": 1, "grad_norm": None, "eval": {"a": {"loss": None, "tokens": 3}}}


def test_json_lines_of_a_new_run_start_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonLines(path, step=None).close()
    assert path.read_text() == ""
    write_lines(path, [0, 1])
    JsonLines(path, step=None).close()
    assert path.read_text() == "", "an earlier run in this folder that saved no checkpoint"
    write_lines(path, [0, 1])
    JsonLines(path, step=0).close()
    assert [line["step"] for line in lines_of(path)] == [0]


EVALUATION = {
    "step": 4,
    "tokens": 400,
    "eval": {
        "pile": {"loss": 2.5, "bits_per_byte": 0.9, "tokens": 64, "role": "upstream"},
        "a/b": {"loss": 1.5, "bits_per_byte": 0.7, "tokens": 64, "role": "downstream"},
    },
    "forgetting": 0.25,
}


def test_scalars_are_the_numbers_under_flat_names() -> None:
    assert scalars(EVALUATION) == {
        "eval/pile/loss": 2.5,
        "eval/pile/bits_per_byte": 0.9,
        "eval/a/b/loss": 1.5,
        "eval/a/b/bits_per_byte": 0.7,
        "forgetting": 0.25,
    }
    line = {"step": 1, "tokens": 2, "loss": 3.0, "skipped": 0}
    assert scalars(line | {"lr": math.nan, "mfu": math.inf, "seconds": None}) == {"loss": 3.0, "skipped": 0}


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def log_steps(logger: TensorBoard, steps: range, offset: float) -> None:
    for step in steps:
        logger.log({"step": step, "tokens": step * 10, "loss": step + offset})
    logger.sync()


def test_tensorboard_shows_every_step_once_after_resumes(tmp_path: Path) -> None:
    """Read by TensorBoard's own reader. Values are small multiples of 1/4: exact in its fp32."""
    first = TensorBoard(tmp_path, step=None)
    log_steps(first, range(1, 8), 0.0)
    first.log(EVALUATION | {"step": 7})
    assert events(tmp_path)["loss"] == [(step, float(step)) for step in range(1, 8)], "on disk after sync"
    # Killed at step 7 without a close; goes on from the checkpoint of step 4, then from that of step 6.
    second = TensorBoard(tmp_path, step=4)
    log_steps(second, range(5, 10), 0.25)
    second.close()
    third = TensorBoard(tmp_path, step=6)
    log_steps(third, range(7, 9), 0.5)
    third.close()
    first.close()
    found = events(tmp_path)
    assert found["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.25), (6, 6.25), (7, 7.5), (8, 8.5)]
    assert found.get("eval/pile/loss", []) == [], "step 7 of the first start is gone with all that it logged"


def test_tensorboard_of_a_new_run_forgets_an_earlier_one(tmp_path: Path) -> None:
    for start in range(2):
        logger = TensorBoard(tmp_path, step=None)
        log_steps(logger, range(3 - start), start / 2)
        logger.close()
    assert events(tmp_path)["loss"] == [(0, 0.5), (1, 1.5)]


class FakeWandB(SimpleNamespace):
    """Records what is asked of wandb, and says what a server would: the first step that it does not have.

    `test_loggers.py` has the real package, which without a server has no earlier steps.
    """

    def __init__(self, starting_step: int = 0) -> None:
        super().__init__(calls=[], logged=[], finished=0, starting_step=starting_step)

    def init(self, **options: Any) -> "FakeWandB":
        self.calls.append(options)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_wandb_goes_on_with_the_same_run_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (None, 20, 30, None):
        logger = WandB("project", tmp_path, {"train": {"seed": 3}}, step)
        logger.log(EVALUATION)
        logger.sync()
        logger.close()
    ids = [call["id"] for call in fake.calls]
    assert ids[0] == ids[1] == ids[2], "a resumed run is the same run"
    assert ids[3] != ids[0], "a new run in the same folder is another"
    assert all(8 <= len(name) <= 64 and name.isalnum() for name in ids)
    for call in fake.calls:
        assert call["project"] == "project" and call["resume"] == "allow" and call["config"] == {"train": {"seed": 3}}
    assert fake.logged == [(4, {**scalars(EVALUATION), "tokens": 400})] * 4
    assert fake.finished == 4


def test_a_run_that_lost_its_wandb_id_gets_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    WandB("project", tmp_path, {}, step=20)
    WandB("project", tmp_path, {}, step=30)
    assert fake.calls[0]["id"] == fake.calls[1]["id"] != ""


@pytest.mark.parametrize(
    ("known", "sent"),
    [
        (0, [1, 2, 3, 4, 5, 6, 7]),  # offline, or a server that has nothing yet
        (2, [2, 3, 4, 5, 6, 7]),  # a kill kept W&B from sending steps 2 and 3, which the checkpoint has
        (4, [4, 5, 6, 7]),
        (6, [6, 7]),  # steps 4 and 5 were sent, and come again after the checkpoint of step 3
        (8, []),
    ],
)
def test_wandb_is_sent_what_it_lacks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: int, sent: list[int]
) -> None:
    """A run killed in step 5 and resumed from step 3, for every state that W&B's server can be in."""
    fake = FakeWandB(starting_step=known)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "tokens": 10 * step, "loss": step / 2}) + "\n" for step in range(1, 6))
    )
    (tmp_path / "wandb-id").write_text("abcdefgh")
    jsonl, wandb = open_loggers(Run(output=str(tmp_path), tensorboard=False, wandb="project"), {}, step=3)
    for step in range(4, 8):
        for logger in (jsonl, wandb):
            logger.log({"step": step, "tokens": 10 * step, "loss": step / 2})
    assert fake.calls[0]["id"] == "abcdefgh"
    assert fake.logged == [(step, {"loss": step / 2, "tokens": 10 * step}) for step in sent]


@pytest.mark.parametrize("tensorboard", [False, True])
@pytest.mark.parametrize("wandb", [None, "project"])
def test_a_run_opens_the_loggers_that_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensorboard: bool, wandb: str | None
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandB())
    loggers = open_loggers(Run(output=str(tmp_path), tensorboard=tensorboard, wandb=wandb), {}, step=None)
    for logger in loggers:
        logger.log({"step": 1, "tokens": 10, "loss": 0.5})
        logger.close()
    expected = [JsonLines, *([TensorBoard] if tensorboard else []), *([WandB] if wandb else [])]
    assert [type(logger) for logger in loggers] == expected
    assert lines_of(tmp_path / "metrics.jsonl") == [{"step": 1, "tokens": 10, "loss": 0.5}]
    assert (tmp_path / "tensorboard").exists() == tensorboard


TRAINING = {
    "step": 30,
    "tokens": 67_829_760,
    "loss": 2.34567,
    "lr": 0.00029876,
    "grad_norm": 0.54321,
    "skipped": 0,
    "tokens_per_second": 236_123.4,
    "mfu": 0.6543,
    "eta_seconds": 45_296.7,
}


def test_console_lines_say_what_people_ask() -> None:
    assert console_line(TRAINING, 110_575) == (
        "step     30/110575   67.8M tokens  loss 2.3457  lr 2.99e-04  grad 0.543  236K tokens/s  MFU 65.4%  12h34m left"
    )
    assert console_line(TRAINING | {"skipped": 2}, 110_575).endswith("12h34m left  skipped 2")
    assert console_line(EVALUATION | {"adaptation": -0.125}, 50) == (
        "step  4/50     400 tokens  eval  pile 2.5000 (0.9000 bits/byte)  a/b 1.5000 (0.7000 bits/byte)"
        "  forgetting +0.2500  adaptation -0.1250"
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"), (7.6, "8"), (999, "999"), (999.4, "999"), (999.6, "1K"), (1000, "1K"), (1234, "1.23K"),
        (99_960, "100K"), (999_499, "999K"), (999_999, "1M"), (2_260_992, "2.26M"), (250e9, "250B"), (999.9e9, "1T"),
        (1.5e12, "1.5T"),
    ],
)  # fmt: skip
def test_short_counts_have_three_digits_and_a_unit(value: float, expected: str) -> None:
    assert short_count(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0m00s"), (59.9, "0m59s"), (60, "1m00s"), (3599.9, "59m59s"), (3600, "1h00m"), (45_296, "12h34m"),
        (48 * 3600 - 1, "47h59m"), (48 * 3600, "2d00h"), (100 * 3600 + 59, "4d04h"),
    ],
)  # fmt: skip
def test_short_times(seconds: float, expected: str) -> None:
    assert short_time(seconds) == expected
