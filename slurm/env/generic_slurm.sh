# shellcheck shell=bash disable=SC1091,SC2034
# Any Slurm machine: sourced by the job script. Add the modules that your environment needs.
if [ -n "$IMAGE" ]; then
  if type apptainer >/dev/null 2>&1; then
    CONTAINER=(apptainer exec --nv)
  else
    CONTAINER=(singularity exec --nv)
  fi
fi
