# shellcheck shell=bash disable=SC1091,SC2034
# Forerunner 1: sourced by the job script; see taiwania2.sh. Its modules are not known here: add
# what your environment needs.
type module >/dev/null 2>&1 || . /etc/profile
module purge
if [ -n "$IMAGE" ]; then
  CONTAINER=(singularity exec --bind /work1)
fi
