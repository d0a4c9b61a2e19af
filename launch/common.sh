# shellcheck shell=bash
# What the scripts of this folder share; they source it. Settings are environment variables, which sbatch passes on:
#
#   DIFFUSSM_DATA         latents: s3://bucket/prefix, or a folder that every node sees
#   DIFFUSSM_RUN          folder of the run, which every node sees
#   DIFFUSSM_CONFIG       a name of diffussm/configs, or a YAML file            (each script has its own)
#   DIFFUSSM_ZERO         1, 2, 3, 3_offload, or a DeepSpeed config             (2)
#   DIFFUSSM_CHECKPOINTS  s3://bucket/prefix or a folder of checkpoints         (checkpoints/ in the run's folder)
#   DIFFUSSM_CACHE        folder of a node's own disk to keep latents in        (none)
#   DIFFUSSM_SETUP        shell file that is sourced first: module load ..., conda activate ..., export AWS_PROFILE=...
#   DIFFUSSM_PYTHON       interpreter                                           (.venv/bin/python, else python3)
#   DIFFUSSM_CONTAINER    image for srun --container-image, where the cluster has pyxis
#   DIFFUSSM_MOUNTS       what the container sees beside this folder and the run's: /a:/a,/b:/b
#   DIFFUSSM_SRUN         more options of srun, separated by blanks: --cpu-bind=none --mpi=pmix
#   DIFFUSSM_PREFLIGHT    0: nodes are not checked before they train            (1)
#   DIFFUSSM_RETRIES      failures in a row after which a job ends; one after half an hour of work is the first  (3)
#   DIFFUSSM_ROOT         this project's folder                                 (where sbatch was called)

fail() {
    echo "error: $*" >&2
    exit 2
}

# need NAME EXAMPLE...: that it is set.
need() {
    local name=$1 advice="start again"
    shift
    [ -z "$job" ] || advice="submit again (sbatch passes your environment on, unless --export says otherwise)"
    [ -n "${!name:-}" ] || fail "$name is not set: export $name=$*, and $advice"
}

# What every script does first.
begin() {
    # of an array SLURM_JOB_ID may mean all its jobs
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-${SLURM_JOB_ID:-}}
    if [ -n "${DIFFUSSM_SETUP:-}" ]; then
        [ -r "$DIFFUSSM_SETUP" ] || fail "DIFFUSSM_SETUP=$DIFFUSSM_SETUP cannot be read: name a shell file"
        set +u # what modules and conda source is not ours to judge
        # shellcheck disable=SC1090
        . "$DIFFUSSM_SETUP"
        set -u
    fi
    if [ -n "${DIFFUSSM_PYTHON:-}" ]; then
        python=$DIFFUSSM_PYTHON
    elif [ -x .venv/bin/python ] && [ -z "${DIFFUSSM_CONTAINER:-}" ]; then
        python=$PWD/.venv/bin/python
    else
        python=python3
    fi
    local cpus=${SLURM_CPUS_PER_TASK:-1}
    export SRUN_CPUS_PER_TASK=$cpus                                # srun takes it from nowhere else
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cpus + 1) / 2))} # the rest is for the loader
    export PYTHONUNBUFFERED=1                                      # a job that is killed has said what it had to say
    export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}       # not that a host's address has no name
    if [ -n "$job" ]; then
        local gpus=${SLURM_GPUS_ON_NODE:-0} tasks=${SLURM_NTASKS_PER_NODE:-1}
        [ "$gpus" = 0 ] || [ "$gpus" -ge "$tasks" ] || fail "$gpus GPUs a node and $tasks tasks a node: a rank takes" \
            "one GPU; give sbatch --gpus-per-node=$gpus --ntasks-per-node=$gpus"
        DIFFUSSM_HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" || true) # for ranks in a container without SLURM
        export DIFFUSSM_HOSTS
        echo "job $job, attempt $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_JOB_NUM_NODES nodes" \
            "$SLURM_JOB_NODELIST × $tasks tasks × $cpus CPUs, $python, $(date '+%F %T %Z')"
    fi
    # Where processes leave the exit code that they have chosen: srun returns how it has ended the others.
    # Of this attempt: one that is cut off must not speak for the next.
    export DIFFUSSM_EXIT_FILE=$PWD/.exit-code-${SLURM_JOB_ID:-$$}-${SLURM_RESTART_COUNT:-0}
    trap 'rm -f "$DIFFUSSM_EXIT_FILE"' EXIT
    trap 'pass_on USR1' USR1
    trap 'pass_on TERM' TERM
    trap 'pass_on INT' INT
}

job='' asked='' # this job, and the signal that asks to stop
signals=0 child=''

pass_on() {
    asked=$1 signals=$((signals + 1))
    [ -n "$child" ] || return 0
    if [ -z "$job" ]; then
        kill -s "$1" -- "-$child" 2>/dev/null || true
    elif [ "$1" = USR1 ]; then # SLURM itself sends TERM to all
        kill -s USR1 "$child" 2>/dev/null || true
    fi
}

# ranks COMMAND...: one process a task; without SLURM, one a GPU. Returns with what they ended with.
ranks() {
    local before chosen code options
    : >"$DIFFUSSM_EXIT_FILE" # not removed: over NFS a file that was not there is believed to be away for a while
    if [ -n "$job" ]; then
        options=(--label --kill-on-bad-exit=1)
        if [ -n "${DIFFUSSM_CONTAINER:-}" ]; then
            local mounts=$PWD:$PWD
            case ${DIFFUSSM_RUN:-} in
            /*) mounts+=,$DIFFUSSM_RUN:$DIFFUSSM_RUN ;;
            esac
            options+=(--container-image="$DIFFUSSM_CONTAINER" --container-workdir="$PWD")
            options+=(--container-mounts="$mounts${DIFFUSSM_MOUNTS:+,$DIFFUSSM_MOUNTS}")
        fi
        # shellcheck disable=SC2206
        options+=(${DIFFUSSM_SRUN:-})
        srun "${options[@]}" "$python" "$@" &
    else
        : "${DIFFUSSM_RANKS:=$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}"
        setsid "$python" -m deepspeed.launcher.runner --num_gpus "$DIFFUSSM_RANKS" "$@" &
    fi
    child=$!
    [ -z "$asked" ] || pass_on "$asked" # which came before there was anybody to tell
    while :; do
        before=$signals code=0
        wait "$child" || code=$?
        [ "$signals" != "$before" ] || break # else it was a signal that ended the wait
    done
    child=
    if [ "$code" != 0 ]; then
        chosen=$(<"$DIFFUSSM_EXIT_FILE") || chosen=
        code=${chosen:-$code}
    fi
    return "$code"
}

# attempts COMMAND...: as often as it takes. A job that is asked to stop queues itself again, once the ranks have saved.
attempts() {
    local code failures=0 began
    while :; do
        began=$SECONDS code=0
        "$@" || code=$?
        [ "$code" != 0 ] || return 0
        if [ -n "$asked" ] || [ "$code" = 75 ]; then
            again "$code"
        fi
        # Bad input: a line says what to mend. Later on it is trouble that may pass: of storage, of a network.
        [ "$code" != 2 ] || [ $((SECONDS - began)) -ge 600 ] || exit 2
        [ $((SECONDS - began)) -lt 1800 ] || failures=0
        failures=$((failures + 1))
        [ "$failures" -le "${DIFFUSSM_RETRIES:-3}" ] || {
            echo "error: failed $failures times in a row, last with exit code $code; what is saved is kept" >&2
            exit "$code"
        }
        current || exit "$code"
        echo "failed with exit code $code: trying again on the same nodes ($failures of ${DIFFUSSM_RETRIES:-3})" >&2
    done
}

# Whether SLURM still counts on this attempt: a node that was cut off may go on with one that it has given up.
current() {
    local tries said
    [ -n "$job" ] || return 0
    for ((tries = 0; tries < 30; tries++)); do
        if said=" $(scontrol show --oneliner job "$job" 2>/dev/null) "; then
            [[ $said == *" JobState=RUNNING "* && $said == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]
            return
        fi
        sleep 10
    done
    echo "error: SLURM's controller does not answer: submit again, the same command goes on from what is saved" >&2
    return 1
}

# again CODE: stopped on request; queue again, unless somebody has cancelled the job. Ends the script.
again() {
    if [ -z "$job" ] || [ "$asked" = TERM ] || [ "$asked" = INT ] || ! current; then
        exit "$1"
    fi
    echo "stopped ${asked:+by $asked }with exit code $1: queued again"
    rm -f "$DIFFUSSM_EXIT_FILE"
    trap '' TERM # SLURM ends this script, and is to let scontrol say its word first
    scontrol requeue "$job" || {
        echo "error: SLURM does not queue job $job again: submit it again, it goes on from what is saved" >&2
        exit "$1"
    }
    sleep 60
    exit "$1"
}

# train ARGUMENTS...: of diffussm/train.py.
train() {
    need DIFFUSSM_DATA "s3://bucket/${DIFFUSSM_CONFIG}/train, or a folder that every node sees"
    need DIFFUSSM_RUN "/shared/runs/${DIFFUSSM_CONFIG}, a folder that every node sees"
    local zero=${DIFFUSSM_ZERO:-2}
    [ -f "$zero" ] || zero=ds_configs/zero$zero.json
    [ -f "$zero" ] || fail "DIFFUSSM_ZERO=$DIFFUSSM_ZERO is none of 1, 2, 3, 3_offload, nor a file"
    case $DIFFUSSM_RUN in
    *://*) fail "DIFFUSSM_RUN=$DIFFUSSM_RUN is no folder: name one; DIFFUSSM_CHECKPOINTS is what may be in S3" ;;
    esac
    mkdir -p "$DIFFUSSM_RUN" || fail "DIFFUSSM_RUN=$DIFFUSSM_RUN cannot be made: name a folder that you may write to"
    DIFFUSSM_RUN=$(realpath "$DIFFUSSM_RUN")
    arguments=(--deepspeed "$zero" --config "$DIFFUSSM_CONFIG" --data.path "$DIFFUSSM_DATA" --run_dir "$DIFFUSSM_RUN")
    [ -z "${DIFFUSSM_CHECKPOINTS:-}" ] || arguments+=(--train.checkpoints "$DIFFUSSM_CHECKPOINTS")
    [ -z "${DIFFUSSM_CACHE:-}" ] || arguments+=(--data.cache "$DIFFUSSM_CACHE")
    arguments+=("$@")
    attempts checked_training
}

checked_training() {
    [ "${DIFFUSSM_PREFLIGHT:-1}" = 0 ] || ranks tools/preflight.py "${arguments[@]}" || return
    [ -z "$asked" ] || return 75
    ranks diffussm/train.py "${arguments[@]}"
}
