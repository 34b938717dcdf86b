"""Sweeps: what a file's arms become, in which order they run, and that what was stopped or failed is gone on with."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slurm_commands
import torch
import yaml
from safetensors.torch import load_file

from fastcpt import UserError, checkpoint, grid, slurm, sweep
from fastcpt.config import to_dict
from fastcpt.results import Results

STEP = 6 * 16  # tokens


@pytest.fixture
def place(
    tmp_path: Path, write_shards: Any, random_documents: Any, tiny_config: Any, monkeypatch: Any
) -> Callable[..., Path]:
    """place(arms, **more) -> sweep.yaml in the current folder, beside base.yaml and two shard sets, new and old."""
    for seed, name in enumerate(("new", "old")):
        write_shards(tmp_path / name, random_documents(seed, 60))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    base = to_dict(tiny_config())
    base["data"]["val"] = [{"name": "old", "path": "old", "role": "upstream"}]
    base["run"] |= {"eval_tokens": 64, "log_every": 1, "eval_every": 2}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))

    def write(arms: dict[str, Any], **more: Any) -> Path:
        file = tmp_path / "sweep.yaml"
        file.write_text(yaml.safe_dump({"base": "base.yaml", "output": "out", "arms": arms, **more}, sort_keys=False))
        return file

    return write


def test_a_file_becomes_the_product_of_its_grids(place: Any) -> None:
    file = place(
        {
            "next": {
                "set": {"init.from": "{base}@4"},
                "grid": {"optim.lr": [1e-3, 2e-3], "schedule.warmup": {"none": 0, "long": 2}},
            },
            "base": {"set": {"data.train": [{"name": "s{seed}", "path": "old", "weight": 1}]}},
            "alone": {"seeds": [5]},
        },
        seeds=[0, 3],
        set={"train.tokens": 4 * STEP},
    )
    jobs = grid.read(file).jobs
    names = [f"next-{lr}-{warmup}" for lr in (0.001, 0.002) for warmup in ("none", "long")]
    assert {job.name for job in jobs} == {
        f"{name}/seed-{seed}" for name in [*names, "base"] for seed in (0, 3)
    } | {"alone/seed-5"}  # fmt: skip
    found = {job.name: job for job in jobs}
    config = found["next-0.002-long/seed-3"].config
    assert (config.optim.lr, config.schedule.warmup, config.train.seed, config.train.tokens) == (2e-3, 2, 3, 4 * STEP)
    assert config.init.from_ == "out/base/seed-3/checkpoints/step-4"
    assert found["next-0.002-long/seed-3"].needs == (Path("out/base/seed-3"),)
    assert found["base/seed-3"].config.data.train[0].name == "s3"
    order = [job.name for job in jobs]
    assert order.index("base/seed-0") < order.index("next-0.001-none/seed-0")
    assert grid.read(file).jobs == jobs  # and the files written are the configurations
    for job in jobs:
        assert grid.parse(["--config", str(job.file)]) == job.config


@pytest.mark.parametrize(
    "arms, more, message",
    [
        ({"a": {"set": {"init.from": "{b}"}}}, {}, "{b} is no arm with this seed"),
        ({"a": {"set": {"init.from": "{b}"}}, "b": {"seeds": [1]}}, {}, "{b} is no arm with this seed"),
        ({"a": {"set": {"init.from": "{b}"}}, "b": {"set": {"init.from": "{a}"}}}, {}, "starts from itself"),
        ({"a": {"grid": {"optim.lr": [1e-3, 1e-3]}}, "a-0.001": {}}, {}, "there are two arms a-0.001"),
        ({"a/b": {}}, {}, "names a folder"),
        ({"a": {"lr": 1}}, {}, "arm a has 'lr'; known are grid, seeds, set"),
        ({"a": {"set": {"lr": 1}}}, {}, "'lr' is no setting"),
        ({"a": {}}, {"seeds": [-1]}, "seeds [-1] are not"),
        ({"a": {}}, {"base": {"train": 5}}, "train of base is 5, not a mapping"),
        (["a"], {}, "arms is ['a'], not a mapping"),
        ({}, {}, "'arms' is missing"),
    ],
)
def test_a_wrong_file_is_refused(place: Any, arms: Any, more: Any, message: str) -> None:
    with pytest.raises(UserError, match=r"sweep\.yaml") as caught:
        grid.read(place(arms, **more))
    assert message in str(caught.value) and not Path("out").exists()


def test_a_setting_that_is_wrong_is_refused_by_name(place: Any) -> None:
    with pytest.raises(UserError, match=r"sweep\.yaml: arm a: optim\.eps 0\.0 must be above 0") as caught:
        grid.read(place({"a": {"set": {"optim.eps": 0.0}}}))
    assert caught.value.id == "setting-out-of-range"


def weights(folder: str) -> dict[str, bytes]:
    """Every tensor of the newest checkpoint, moments too."""
    newest = checkpoint.newest(Path(folder))
    assert newest is not None
    tensors = load_file(newest / "tensors-00001-of-00001.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.fixture
def chain(place: Any) -> Path:
    """Two arms after a base, of two seeds: one of them fails, for it is told to read what is not there."""
    after = {"init.from": "{base}", "init.force": True, "optim.lr": 2e-3}
    return place(
        {
            "after": {"set": {**after, "run.stop_at": 3}},
            "broken": {"set": {"data.train": [{"name": "gone", "path": "gone", "weight": 1}]}},
            "lost": {"set": {"init.from": "{broken}", "init.force": True}},
            "base": {},
        },
        seeds=[0, 1],
    )


def test_what_can_run_runs_and_only_what_is_missing(chain: Path, capfd: Any) -> None:
    assert sweep.run(str(chain), 2, None, False) == sweep.FAILED
    printed = capfd.readouterr()
    assert "4 of 8: after/seed-" in printed.out
    assert "broken/seed-1 failed: exit code 2; see out/logs/broken-seed-1.log" in printed.err
    assert "lost/seed-0 failed: not started: out/broken/seed-0 failed" in printed.err
    assert "gone" in Path("out/logs/broken-seed-0.log").read_text()
    table = Results.read("out/results.csv")
    assert table.arms == ["base", "after"] and table.seeds("base", "after") == [0, 1]
    assert [point.step for point in table.curve("base", 0, "old")] == [0, 1, 2, 4, 5]
    assert table.curve("after", 1, "old")[-1].step == 3
    lines = [json.loads(line) for line in Path("out/after/seed-1/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["eval"]["old"]["loss"] == pytest.approx(table.final("base", 1, "old"), abs=1e-6)

    again = [sys.executable, "-m", "fastcpt.train", "--config", "out/configs/base-seed-1.yaml", "--run.output", "alone"]
    subprocess.run(again, check=True, capture_output=True)
    assert weights("alone") == weights("out/base/seed-1") != weights("out/base/seed-0")

    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("metrics.jsonl")}
    chain.write_text(chain.read_text().replace("path: gone", "path: new"))
    assert sweep.run(str(chain), 1, None, False) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "4 of 8" not in (out := capfd.readouterr().out) and "8 of 8: lost/seed-1" in out
    assert Results.read("out/results.csv").arms == ["base", "after", "broken", "lost"]

    chain.write_text(chain.read_text().replace("optim.lr: 0.002", "optim.lr: 0.003"))
    with pytest.raises(UserError, match=r"optim\.lr was 0\.002, is 0\.003"):
        sweep.run(str(chain), 1, None, False)


def test_a_stopped_sweep_saves_and_goes_on_to_the_same_bits(place: Any) -> None:
    arms = {f"arm{n}": {"set": {"train.tokens": 3000 * STEP, "run.save_every": 10**6}} for n in range(2)}
    arms["later"] = {"set": {"init.from": "{arm0}", "init.force": True, "optim.lr": 2e-3}}
    command = [sys.executable, "-c", "import sys; from fastcpt import sweep; sys.exit(sweep.run('sweep.yaml', 2, None, False))"]  # fmt: skip
    place(arms, set={"run.eval_every": 10**6})
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    logs = [Path(f"out/arm{n}/seed-0/metrics.jsonl") for n in range(2)]
    deadline = time.monotonic() + 120
    while not all(log.exists() and log.read_text().count("\n") > 5 for log in logs) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == sweep.PREEMPTED, printed
    kept = [int(path.name[5:]) for n in range(2) for path in Path(f"out/arm{n}/seed-0/checkpoints").glob("step-*")]
    assert len(kept) == 2 and all(0 < step < 3000 for step in kept), kept
    place(arms, set={"run.eval_every": 10**6, "run.stop_at": max(kept) + 5})
    assert sweep.run("sweep.yaml", 2, None, False) == 0
    for n in range(2):
        again = ["--config", f"out/configs/arm{n}-seed-0.yaml", "--run.output", f"alone{n}"]
        subprocess.run([sys.executable, "-m", "fastcpt.train", *again], check=True, capture_output=True)
        assert weights(f"alone{n}") == weights(f"out/arm{n}/seed-0")


def test_a_worker_that_is_killed_is_named_and_replaced(place: Any, monkeypatch: Any, capfd: Any) -> None:
    place({"first": {"set": {"train.tokens": 10**6 * STEP, "run.eval_every": 10**6}}, "second": {}})
    running = sweep.Worker.run

    def run(worker: sweep.Worker, job: grid.Job, log: Path) -> int:
        def kill() -> None:
            metrics = job.folder / "metrics.jsonl"
            while not metrics.exists() or metrics.stat().st_size == 0:
                time.sleep(0.05)
            assert worker._process is not None
            worker._process.kill()

        if job.arm == "first":
            threading.Thread(target=kill, daemon=True).start()
        return running(worker, job, log)

    monkeypatch.setattr(sweep.Worker, "run", run)
    assert sweep.run("sweep.yaml", 1, None, False) == sweep.FAILED
    assert "first/seed-0 failed: ended by signal 9; see out/logs/first-seed-0.log" in capfd.readouterr().err
    table = Results.read("out/results.csv")
    assert table.curve("second", 0, "old")[-1].step == 5
    assert table.arms == ["second"], "what the first had evaluated is no result of it"


def test_jobs_of_slurm_wait_for_each_other_and_are_not_submitted_twice(
    chain: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    for name, value in slurm_commands.install(tmp_path / "bin").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.2)
    from submitit.slurm.slurm import SlurmJob

    monkeypatch.setattr(SlurmJob.watcher, "_delay_s", 0)
    SlurmJob.watcher.clear()  # of a cluster of before, whose jobs had the same numbers
    chain.write_text(chain.read_text().replace("seeds:\n- 0\n- 1", "seeds:\n- 0"))
    assert sweep.run(str(chain), None, "partition=gpu,timeout_min=5,qos=high", False) == sweep.FAILED
    printed = capfd.readouterr()
    scripts = {int(path.stem): path.read_text() for path in (tmp_path / "bin" / "state").glob("*.sh")}
    numbers = {key: int(value) for key, value in json.loads(Path("out/slurm/jobs.json").read_text()).items()}
    assert sorted(numbers.values()) == sorted(scripts) == [1, 2, 3, 4]
    assert all("--partition=gpu" in text and "--qos=high" in text and "--time=5" in text for text in scripts.values())
    assert f"--dependency=afterok:{numbers['base/seed-0']}\n" in scripts[numbers["after/seed-0"]]
    assert "dependency" not in scripts[numbers["base/seed-0"]]
    assert Results.read("out/results.csv").arms == ["base", "after"]
    assert "broken/seed-0 failed" in printed.err and "lost/seed-0 failed" in printed.err
    assert sweep.run(str(chain), None, "partition=gpu", True) == 0  # a dry run submits nothing
    assert len(list((tmp_path / "bin" / "state").glob("*.sh"))) == 4


def test_jobs_that_wait_are_not_submitted_again(chain: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    """Ctrl-C while Slurm has not started any; the same command, and it waits for those that there are."""
    for name, value in slurm_commands.install(tmp_path / "bin").items():
        monkeypatch.setenv(name, value)
    state = tmp_path / "bin" / "state"
    (state / "hold").touch()
    from submitit.slurm.slurm import SlurmJob

    monkeypatch.setattr(SlurmJob.watcher, "_delay_s", 0)
    SlurmJob.watcher.clear()  # of a cluster of before, whose jobs had the same numbers
    chain.write_text(yaml.safe_dump(yaml.safe_load(chain.read_text()) | {"arms": {"base": {}}, "seeds": [0]}))

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(slurm.time, "sleep", interrupted)
        assert sweep.run(str(chain), None, "partition=gpu", False) == sweep.PREEMPTED
    assert "1 jobs are left to Slurm" in capfd.readouterr().err
    (state / "hold").unlink()
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.2)
    assert sweep.run(str(chain), None, "partition=gpu", False) == 0
    assert [path.name for path in state.glob("*.sh")] == ["1.sh"]


def test_workers_share_the_processors_unless_told(monkeypatch: Any) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert sweep.Worker(0, 1, [])._environment["OMP_NUM_THREADS"] == str(cores)
    assert sweep.Worker(0, 10 * cores, [])._environment["OMP_NUM_THREADS"] == "1"
    assert [sweep.Worker(n, 3, ["4", "6"])._environment["CUDA_VISIBLE_DEVICES"] for n in range(3)] == ["4", "6", "4"]
    assert torch.cuda.is_available() or "CUDA_VISIBLE_DEVICES" not in sweep.Worker(0, 1, [])._environment
