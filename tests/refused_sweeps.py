"""What is refused of sweeps and of their reports. See refusals.py."""

from refusals import Case, both, put

# fmt: off
CASES = (
    Case("sweep-file-missing", "named a sweep's file that there is not", "sweep gone.yaml", "gone.yaml: there is no such file"),
    Case("sweep-file-wrong", "named no arms", "sweep sweep.yaml", "sweep.yaml: 'arms' is missing",
         put("sweep.yaml", "base: run.yaml\noutput: out\n")),
    Case("setting-out-of-range", "gave an arm a setting that is none", "sweep sweep.yaml",
         "sweep.yaml: arm a: optim.eps 0.0 must be above 0",
         put("sweep.yaml", "base: run.yaml\noutput: out\narms: {a: {set: {optim.eps: 0}}}\n")),
    Case("option-out-of-range", "no runs at once", "sweep sweep.yaml --jobs 0", "--jobs 0: must be 1 or more",
         put("sweep.yaml", "base: run.yaml\noutput: out\narms: {a: {}}\n")),
    Case("results-missing", "reported on a sweep that has not run", "report sweep.yaml --output page.html",
         "out/results.csv: there is no such table; `fastcpt sweep` writes it",
         put("sweep.yaml", "base: run.yaml\noutput: out\narms: {a: {}}\n")),
    Case("results-wrong", "changed a sweep's table", "report sweep.yaml --output page.html",
         "out/results.csv: its columns are not arm, seed, start, step, tokens, set, role, loss, bits_per_byte",
         both(put("sweep.yaml", "base: run.yaml\noutput: out\narms: {a: {}}\n"), put("out/results.csv", "arm,loss\n"))),
    Case("slurm-option-wrong", "gave Slurm an option without a value", "sweep sweep.yaml --slurm gpu",
         "--slurm 'gpu': write NAME=VALUE, such as partition=gpu",
         put("sweep.yaml", "base: run.yaml\noutput: out\narms: {a: {}}\n")),
    Case("slurm-missing", "submitted to Slurm where there is none", "sweep sweep.yaml --slurm partition=gpu",
         "--slurm partition=gpu: there is no srun here; run it where jobs are submitted, or without --slurm",
         put("sweep.yaml", "base: run.yaml\noutput: out\narms: {a: {}}\n")),
)
