#!/usr/bin/env bash
# 50,000 samples of a run's newest checkpoint, drawn and then scored by all GPUs.
#
#     export DIFFUSSM_RUN=/shared/runs/xl512 DIFFUSSM_REFERENCE=/shared/reference/imagenet512.npz
#     sbatch launch/slurm_eval.sh
#     DIFFUSSM_COUNT=10000 sbatch --nodes=2 launch/slurm_eval.sh --guidance 1.5
#
# DIFFUSSM_RUN is a run's folder, a checkpoint, or checkpoints in S3. Of a run that is still training name a checkpoint:
# a job that is queued again would begin anew with a newer one. DIFFUSSM_OUT is where the samples go: by default samples/
# in the run's folder; beside anything else it must be given. DIFFUSSM_REFERENCE is what they are compared with (what the
# run names); DIFFUSSM_EXTRACTOR and DIFFUSSM_INCEPTION_WEIGHTS by which features: inception-2015, which published figures
# are of, and the file of its weights where no network is. Options of sbatch stand before the script, options of tools/sample.py after it. The rest is as in
# slurm_xl512.sh.
#
#SBATCH --job-name=diffussm-eval    # names the log, too
#SBATCH --nodes=1                   # or as many as you like
#SBATCH --gpus-per-node=8           # all of them: a rank uses one and sees its neighbours
#SBATCH --ntasks-per-node=8         # a process a GPU
#SBATCH --cpus-per-task=8           # of a process: they load, decode and score
#SBATCH --mem=0                     # all of a node's memory
#SBATCH --time=24:00:00             # of an attempt: the job queues itself again
#SBATCH --signal=B:USR1@60          # a minute before: what is drawn stays, the job queues itself again
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
need DIFFUSSM_RUN "/shared/runs/xl512: the folder of a run, or s3://bucket/prefix of its checkpoints"
if [ ! -f "$DIFFUSSM_RUN/config.yaml" ]; then # no run's folder
    need DIFFUSSM_OUT "/shared/samples/xl512, a folder for the samples, which every node sees"
fi
out=${DIFFUSSM_OUT:-$DIFFUSSM_RUN/samples}
scoring=("$out/samples.npz")
[ -z "${DIFFUSSM_REFERENCE:-}" ] || scoring+=(--reference "$DIFFUSSM_REFERENCE")
[ -z "${DIFFUSSM_EXTRACTOR:-}" ] || scoring+=(--extractor "$DIFFUSSM_EXTRACTOR")
[ -z "${DIFFUSSM_INCEPTION_WEIGHTS:-}" ] || scoring+=(--inception-weights "$DIFFUSSM_INCEPTION_WEIGHTS")
draw_and_score() {
    if [ -n "${DIFFUSSM_REFERENCE:-}" ]; then # what cannot be compared is told before hours of drawing
        DIFFUSSM_SRUN="${DIFFUSSM_SRUN:-} --nodes=1 --ntasks=1" ranks tools/eval_fid.py "${scoring[@]}" --check || return
    fi
    ranks tools/sample.py "$DIFFUSSM_RUN" --count "${DIFFUSSM_COUNT:-50000}" --out "$out" "$@" || return
    ranks tools/eval_fid.py "${scoring[@]}"
}
attempts draw_and_score "$@"
