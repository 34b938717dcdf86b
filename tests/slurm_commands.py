"""Slurm's commands as far as submitit uses them, for a cluster of this machine alone: jobs run in the background."""

import os
from pathlib import Path

COMMANDS = {
    "sbatch": r"""#!/bin/bash
# Runs the script once the jobs that it depends on have ended well; what they were told is in $FAKE_SLURM.
number=$(( $(ls $FAKE_SLURM | grep -c '\.sh$') + 1 ))
cp "$1" $FAKE_SLURM/$number.sh
echo PENDING > $FAKE_SLURM/$number.state
after=$(sed -n "s/.*--dependency=afterok://p" "$1" | tr ":'" "  ")
(
  for other in $after; do
    while grep -qE 'PENDING|RUNNING' $FAKE_SLURM/$other.state; do sleep 0.1; done
    grep -q COMPLETED $FAKE_SLURM/$other.state || { echo CANCELLED > $FAKE_SLURM/$number.state; exit; }
  done
  while [ -e $FAKE_SLURM/hold ]; do sleep 0.1; done
  echo RUNNING > $FAKE_SLURM/$number.state
  export SLURM_JOB_ID=$number SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
  export SLURM_JOB_NODELIST=localhost
  bash $FAKE_SLURM/$number.sh && echo COMPLETED > $FAKE_SLURM/$number.state || echo FAILED > $FAKE_SLURM/$number.state
) > /dev/null 2>&1 &
echo "Submitted batch job $number"
""",
    "srun": r"""#!/bin/bash
while [[ $1 == --* ]]; do
  case $1 in --output) output=$2; shift 2;; --error) errors=$2; shift 2;; *) shift;; esac
done
for name in output errors; do  # %j is the job, %t the task
  printf -v $name %s "$(echo "${!name}" | sed "s/%j/$SLURM_JOB_ID/g; s/%t/0/g")"
done
exec "$@" > "$output" 2> "$errors"
""",
    "sacct": r"""#!/bin/bash
echo "JobID|State|NodeList"
while [ $# -gt 0 ]; do
  [ "$1" = -j ] && [ -f $FAKE_SLURM/$2.state ] && echo "$2|$(cat $FAKE_SLURM/$2.state)|localhost"
  shift
done
exit 0
""",
}


def install(folder: Path) -> dict[str, str]:
    """Writes the commands to a folder. Returns the environment in which they are found."""
    (folder / "state").mkdir(parents=True)
    for name, text in COMMANDS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "FAKE_SLURM": str(folder / "state")}
