"""The runs of a sweep as jobs of a Slurm cluster, submitted by submitit: `fastcpt sweep FILE --slurm partition=gpu,...`.

Every run is a job that waits for the jobs of the runs it starts from. Jobs that were submitted before and have not ended are
not submitted again: OUTPUT/slurm/jobs.json knows them. A job that Slurm ends early has saved (exit code 75); the same
command submits it again, and it goes on.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fastcpt import UserError
from fastcpt.grid import Job
from fastcpt.pending import FAILED, PREEMPTED, Pending, tokens_of
from fastcpt.progress import Bar

POLL_SECONDS = 10.0
PORT = 29400  # of torchrun's rendezvous, on a job's first machine


def options_of(text: str) -> dict[str, Any]:
    """`partition=gpu,gpus_per_node=8,timeout_min=600` -> submitit's parameters; what it does not know is sbatch's own."""
    options: dict[str, Any] = {}
    for entry in filter(None, text.split(",")):
        name, equals, value = entry.partition("=")
        if not (name and equals and value):
            raise UserError("slurm-option-wrong", f"--slurm {entry!r}: write NAME=VALUE, such as partition=gpu")
        options[name] = int(value) if value.isdecimal() else value
    if shutil.which("srun") is None:
        raise UserError(
            "slurm-missing",
            f"--slurm {text}: there is no srun here; run it where jobs are submitted, or without --slurm",
        )
    return options


def launch(file: str) -> int:
    """Within a job: the run of a configuration, on every GPU of its machines. Returns the exit code; raises if it failed."""
    import submitit

    environment = submitit.JobEnvironment()
    gpus = len([gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu])
    machines = environment.num_nodes
    command = [sys.executable, "-m", "fastcpt.train", "--config", file]
    if machines * gpus > 1:
        where = f"{environment.hostnames[0]}:{PORT}"
        command[1:1] = [
            "-m", "torch.distributed.run", f"--nnodes={machines}", f"--nproc_per_node={gpus}", "--rdzv_backend=c10d",
            f"--rdzv_endpoint={where}", f"--rdzv_id={environment.job_id}",
        ]  # fmt: skip
    code = subprocess.run(command, check=False).returncode
    if code:  # Slurm starts no job that depends on this one
        raise RuntimeError(f"{' '.join(command)}: exit code {code}")
    return code


def submit(sweep: Pending, options: dict[str, Any]) -> None:
    """Submits what is left of the sweep, and waits for it. Ctrl-C leaves the jobs to Slurm."""
    try:
        import submitit
    except ImportError:
        raise UserError("submitit-missing", "--slurm needs submitit; pip install 'fastcpt[slurm]'") from None
    folder = (sweep.output / "slurm").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    known_file = folder / "jobs.json"
    known: dict[str, str] = json.loads(known_file.read_text()) if known_file.exists() else {}
    executor = submitit.AutoExecutor(folder / "%j", cluster="slurm")
    own: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in options.items():
        (own if name in executor._valid_parameters() or name.startswith("slurm_") else others)[name] = value
    jobs: dict[Path, Any] = {}
    for job in sweep.left:
        if (number := known.get(job.name)) is not None:
            before: Any = submitit.SlurmJob(folder / "%j", number)
            if not before.done(force_check=True):
                jobs[job.folder] = before
                continue
        after = [jobs[needed].job_id for needed in job.needs if needed in jobs]
        waits = {"dependency": f"afterok:{':'.join(after)}", "kill_on_invalid_dep": "yes"} if after else {}
        executor.update_parameters(
            name=f"{job.arm}-{job.seed}", **own, slurm_additional_parameters={**others, **waits}
        )  # fmt: skip
        jobs[job.folder] = executor.submit(launch, str(job.file.resolve()))
        known[job.name] = jobs[job.folder].job_id
        known_file.write_text(json.dumps(known, indent=1))
        print(f"{job.name}: job {known[job.name]}", flush=True)
    wait(sweep, jobs)


def wait(sweep: Pending, jobs: dict[Path, Any]) -> None:
    """Until all have ended, or Ctrl-C."""
    under_way: dict[Path, Job] = {job.folder: job for job in sweep.left}
    begun = time.monotonic()
    try:
        with Bar("sweep", sum(map(tokens_of, sweep.left))) as bar:
            while under_way:
                for path, job in list(under_way.items()):
                    if not jobs[path].done():
                        continue
                    del under_way[path]
                    sweep.left.remove(job)
                    failure = jobs[path].exception()
                    code = 0 if failure is None else PREEMPTED if f"exit code {PREEMPTED}" in str(failure) else FAILED
                    sweep.ended(job, code, time.monotonic() - begun, bar)
                    if code == FAILED:
                        sweep.failed[path] = f"see {jobs[path].paths.stderr}"
                if under_way:
                    time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        sweep.stopping = True
        print(f"{len(under_way)} jobs are left to Slurm; the same command waits for them", file=sys.stderr)
