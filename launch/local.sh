#!/usr/bin/env bash
# Training on the GPUs of this machine, without SLURM; the settings are those of the cluster's scripts.
#
#     export DIFFUSSM_CONFIG=xl256 DIFFUSSM_DATA=/data/imagenet256/train DIFFUSSM_RUN=runs/xl256
#     bash launch/local.sh --train.lr 2e-4
#
# DIFFUSSM_RANKS is the number of processes, by default one a GPU. Ctrl-C lets the ranks save, and ends with code 75.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/common.sh
unset SLURM_JOB_ID SLURM_ARRAY_JOB_ID # inside an allocation this is still one machine
DIFFUSSM_CONFIG=${DIFFUSSM_CONFIG:-fashion32}
begin
train "$@"
