#!/usr/bin/env bash
# DiffuSSM-XL on ImageNet at 512 px, on 64 GPUs.
#
#     export DIFFUSSM_DATA=s3://bucket/imagenet512/train DIFFUSSM_RUN=/shared/runs/xl512
#     sbatch launch/slurm_xl512.sh
#     sbatch --account=lab --partition=gpu --nodes=4 launch/slurm_xl512.sh --train.lr 2e-4
#
# Options of sbatch stand before the script, and win over those below; options of training stand after it. What else can
# be set is in launch/common.sh; docs/slurm.md is the way from an empty account to a run, and says what may go wrong.
#
#SBATCH --job-name=diffussm-xl512   # names the log, too
#SBATCH --nodes=8                   # 64 GPUs take 4 images each of a global batch of 256
#SBATCH --gpus-per-node=8           # all of them: a rank uses one and sees its neighbours
#SBATCH --ntasks-per-node=8         # a rank is a task, and takes one GPU: as many as GPUs
#SBATCH --cpus-per-task=8           # of a rank: its own thread, four that fetch data, one that saves
#SBATCH --mem=0                     # all of a node's memory
#SBATCH --time=24:00:00             # of an attempt: the job queues itself again
#SBATCH --signal=B:USR1@300         # five minutes before, tell this shell, which tells the ranks: they save and end
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
DIFFUSSM_CONFIG=${DIFFUSSM_CONFIG:-xl512}
begin
train "$@"
