# shellcheck shell=bash disable=SC1091,SC2034
# Nano5: sourced by the job script; see taiwania2.sh.
type module >/dev/null 2>&1 || . /etc/profile
module purge
if [ -n "$IMAGE" ]; then
  module load singularity-ce
  CONTAINER=(singularity exec --nv --bind /work)
else
  module load cuda/12.6
fi
