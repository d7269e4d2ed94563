# shellcheck shell=bash disable=SC1091,SC2034
# Nano4: sourced by the job script; see taiwania2.sh.
type module >/dev/null 2>&1 || . /etc/profile
module purge
if [ -n "$IMAGE" ]; then
  module load apptainer
  CONTAINER=(apptainer exec --nv --bind /work)
else
  module load gcc/13.2 cuda/12.6
fi
