# shellcheck shell=bash disable=SC1091,SC2034
# Taiwania 2: sourced by the job script. IMAGE is empty unless cluster.image is set; CONTAINER
# starts it. PYTHON may be replaced, by a conda environment's for instance.
type module >/dev/null 2>&1 || . /etc/profile
module purge
if [ -n "$IMAGE" ]; then
  module load singularity
  CONTAINER=(singularity exec --nv --bind /work) # /home and the working folder come by themselves
else
  module load cuda/12.8 # nvcc for the ops that DeepSpeed builds at first use (offload)
fi
