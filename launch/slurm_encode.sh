#!/usr/bin/env bash
# Images into latent shards. What was broken off goes on: the same command again.
#
#     export DIFFUSSM_SOURCE=folder DIFFUSSM_INPUT=/data/imagenet/train DIFFUSSM_OUT=s3://bucket/imagenet512/train
#     sbatch launch/slurm_encode.sh --size 512 --flip                           # one job; its tasks share the work
#     sbatch --nodes=4 launch/slurm_encode.sh --size 512 --flip                 # or of several nodes
#     sbatch --array=0-15 launch/slurm_encode.sh --size 512 --flip              # or 16 jobs, as nodes get free
#     DIFFUSSM_SRUN=--mpi=pmix sbatch --nodes=4 launch/slurm_encode.sh ...      # where MPI is to start the tasks
#
# DIFFUSSM_SOURCE is folder, lsun or webdataset. Options of sbatch stand before the script, options of
# tools/encode_latents.py after it. The rest is as in slurm_xl512.sh.
#
#SBATCH --job-name=diffussm-encode  # names the log, too
#SBATCH --nodes=1                   # or as many as you like
#SBATCH --gpus-per-node=8           # all of them: a rank uses one and sees its neighbours
#SBATCH --ntasks-per-node=8         # a process a GPU
#SBATCH --cpus-per-task=8           # of a process: they read and resize images
#SBATCH --mem=0                     # all of a node's memory
#SBATCH --time=12:00:00             # of an attempt: the job queues itself again
#SBATCH --signal=B:USR1@60          # a minute before: what is finished stays, the job queues itself again
#SBATCH --requeue                   # when a node fails, too
#SBATCH --open-mode=append          # every attempt writes on in the same log
#SBATCH --output=%x-%j.out          # here: SLURM fails a job without a word where a log's folder is missing
set -euo pipefail
cd "${DIFFUSSM_ROOT:-${SLURM_SUBMIT_DIR:-.}}"
[ -f launch/common.sh ] || {
    echo "error: $PWD is not the project's folder: call sbatch there, or export DIFFUSSM_ROOT=its path" >&2
    exit 2
}
. launch/common.sh
begin
need DIFFUSSM_INPUT "/data/imagenet/train: where the images are"
need DIFFUSSM_OUT "s3://bucket/imagenet512/train, or a folder that every node sees"
# shellcheck disable=SC2153
arguments=(--source "${DIFFUSSM_SOURCE:-folder}" --input "$DIFFUSSM_INPUT" --out "$DIFFUSSM_OUT")
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    # shellcheck disable=SC2153
    first=$SLURM_ARRAY_TASK_MIN step=$SLURM_ARRAY_TASK_STEP count=$SLURM_ARRAY_TASK_COUNT
    [ $(((SLURM_ARRAY_TASK_MAX - first) / step + 1)) = "$count" ] ||
        fail "an array with gaps shares the work wrongly: submit the whole --array again, what is finished stays"
    arguments+=(--share "$(((SLURM_ARRAY_TASK_ID - first) / step))/$count")
fi
attempts ranks tools/encode_latents.py "${arguments[@]}" "$@"
