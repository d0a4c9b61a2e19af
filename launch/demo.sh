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

# An earlier demo that was killed may have left ranks that still train this run: let them end.
if [ -e "$run/lock" ] && ! flock --nonblock "$run/lock" true; then
    echo "$run is still being trained by $(cat "$run/lock"), left over from an earlier demo: waiting for its end (kill it to take over at once)"
    flock "$run/lock" true
fi

step "2/4  train: $run"
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    deepspeed --quiet diffussm/train.py --deepspeed ds_configs/zero2.json
else
    export DS_ACCELERATOR=cpu
    OMP_NUM_THREADS=1 deepspeed --quiet --num_gpus 2 diffussm/train.py --deepspeed ds_configs/zero2.json
fi

step "3/4  sample with the averaged weights and guidance"
python tools/sample.py "$run" --count 400 --untrained

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
