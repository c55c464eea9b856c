#!/bin/sh
# The program as several ranks of this machine: train --gpus N, and mpirun where there is one. usage: sh_ranks.sh BUILD
set -eu
retort=$1/retort
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

head -n 40 examples/prompts/almanac_train.jsonl >"$tmp/text.jsonl"
recipe() { # what to put in front, directory, options ...
    before=$1 out=$2
    shift 2
    $before "$retort" train --student examples/tiny_student --data "$tmp/text.jsonl" --device cpu --threads 1 --batch-tokens 1024 --lr 2e-3 --save-every 0 --out "$tmp/$out" "$@"
}
train() {
    recipe "" "$@"
}
soon() { # a command: until it holds, a minute at most
    tries=0
    while ! "$@" && [ $tries -lt 600 ]; do
        sleep 0.1
        tries=$((tries + 1))
    done
}
interrupt() { # a process: $code is its exit code
    kill -INT "$1"
    code=0
    wait "$1" || code=$?
}
# losses of two runs, step by step, within 1e-5 of each other
same() {
    for run in "$1" "$2"; do
        sed -n 's/.*"step": *\([0-9]*\),.*"loss": *\([0-9.e+-]*\),.*/\1 \2/p' "$tmp/$run/metrics.jsonl" >"$tmp/$run.loss"
    done
    paste "$tmp/$1.loss" "$tmp/$2.loss" | awk '
        { d = $2 - $4; if (d < 0) d = -d; if ($1 != $3 || !($2 > 0) || d > 1e-5 * $2) bad = 1 }
        END { exit bad || NR != 12 }' || { echo "losses of $1 and $2 differ"; paste "$tmp/$1.loss" "$tmp/$2.loss"; exit 1; }
}

train one --steps 12 --quiet
train two --steps 12 --gpus 2 --quiet
same one two
grep -q '"ranks": *2' "$tmp/two/run.json"

# a plan starts nothing and knows the ranks
train plan --steps 12 --gpus 3 --dry-run --json --quiet | grep -q '"ranks":3'
[ ! -e "$tmp/plan" ]

# an interrupt of the one process ends all ranks, which save; the same command goes on, with another number of ranks, too
(recipe exec cut --steps 5000 --epochs 5000 --gpus 2 --quiet 2>"$tmp/cut.err") &
pid=$!
soon test -s "$tmp/cut/metrics.jsonl"
interrupt $pid
[ $code = 130 ] || { echo "interrupted: exit code $code"; cat "$tmp/cut.err"; exit 1; }
ls "$tmp"/cut/ckpt-* >/dev/null

# a checkpoint that rank 0 cannot put in place is lost for all: nobody says that it was saved
(recipe exec lost --steps 5000 --epochs 5000 --gpus 2 --quiet 2>"$tmp/lost.err") &
pid=$!
soon test -s "$tmp/lost/metrics.jsonl"
(cd "$tmp/lost" && seq -f 'ckpt-%08.0f' 1 2000 | xargs touch)
interrupt $pid
[ $code = 1 ] || { echo "a lost checkpoint: exit code $code"; cat "$tmp/lost.err"; exit 1; }
if grep -q 'saved' "$tmp/lost.err"; then
    echo "a lost checkpoint is said to be saved"
    exit 1
fi

# an interrupt while ranks meet ends the wait
RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29973 recipe exec met --steps 12 2>"$tmp/met.err" &
pid=$!
soon grep -q 'meeting at' "$tmp/met.err"
interrupt $pid
[ $code = 130 ] || { echo "interrupted while ranks meet: exit code $code"; cat "$tmp/met.err"; exit 1; }
[ ! -e "$tmp/met" ]

# what one rank finds is the exit code of all: a usage error here
code=0
train bad --steps 12 --gpus 2 --w-ce 0 --quiet 2>"$tmp/bad.err" || code=$?
[ $code = 2 ] || { echo "bad arguments: exit code $code"; cat "$tmp/bad.err"; exit 1; }
grep -q 'nothing would be learnt' "$tmp/bad.err"

# more ranks of a launcher than --gpus says
code=0
RANK=0 WORLD_SIZE=3 LOCAL_RANK=0 train bad --steps 12 --gpus 2 --quiet 2>"$tmp/bad.err" || code=$?
[ $code = 2 ] || { echo "contradiction: exit code $code"; exit 1; }

if command -v mpirun >/dev/null 2>&1; then
    OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 recipe "mpirun --oversubscribe -n 2" mpi --steps 12 --quiet
    same one mpi
else
    echo "SKIP mpirun is not here"
fi
