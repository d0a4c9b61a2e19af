#!/usr/bin/env bash
# The whole way on Fashion-MNIST: encode, train (about 10 minutes on 2 CPU cores), sample, score. `make demo` calls it.
# Killed at any moment, it is run again and goes on from where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
run=runs/fashion32
began=$SECONDS

step() { printf '\n\033[1m[%d:%02d] %s\033[0m\n' $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)) "$*"; }

step "1/4  encode Fashion-MNIST into latent shards: data/fashion32"
python tools/encode_latents.py --source fashion-mnist --codec pixel --out data/fashion32

step "2/4  train: $run"
train() {
    if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        deepspeed --quiet diffussm/train.py --deepspeed ds_configs/zero2.json
    else
        DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 \
            deepspeed --quiet --num_gpus 2 diffussm/train.py --deepspeed ds_configs/zero2.json
    fi
}
in_use() { [ -e "$run/lock" ] && ! flock --nonblock "$run/lock" true; }
# Where the first process of an earlier demo was killed, its ranks may live on and hold the run: let them end.
wait_for_earlier() {
    echo "$run is being trained by $(cat "$run/lock"), left over from an earlier demo: waiting (kill it to take over)"
    flock "$run/lock" true
}
if in_use; then wait_for_earlier; fi
until train; do
    in_use || exit 1
    wait_for_earlier
done

step "3/4  sample with the averaged weights and guidance"
python tools/sample.py "$run" --count 300 --untrained

step "4/4  score"
python tools/eval_fid.py "$run/samples/samples.npz" --max-reference 2000

step "done"
cat <<TXT
pictures      $run/samples/grid.png, a row a class
samples       $run/samples/samples.npz
table         $run/scores.json
log           $run/log.jsonl
TensorBoard   .venv/bin/tensorboard --logdir $run/tensorboard
TXT
