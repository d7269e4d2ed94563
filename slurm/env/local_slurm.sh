# shellcheck shell=bash disable=SC1091,SC2034
# A Slurm of CPU nodes: the environment that submitted the job is on all of them.
if [ -n "$IMAGE" ]; then
  if type apptainer >/dev/null 2>&1; then
    CONTAINER=(apptainer exec)
  else
    CONTAINER=(singularity exec)
  fi
fi
