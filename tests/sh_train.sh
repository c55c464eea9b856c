#!/bin/sh
# Training on each device of this machine: what is refused before the first step, with what would work; and a run that is killed and goes on.
# usage: sh_train.sh BUILD [DEVICE ...]        default: cpu, and cuda where there is a GPU (else SKIP)
set -u
retort=$1/retort
shift
teacher=examples/tiny_teacher
student=examples/tiny_student
prompts=examples/prompts
d=$(mktemp -d /tmp/retort-train-XXXXXX)
trap 'rm -rf "$d"' EXIT
failed=0 checks=0

bad() {
    failed=$((failed + 1))
    echo "FAILED: $1"
    tail -n 6 "$d/err"
}
must() {
    "$@" >/dev/null 2>"$d/err" </dev/null || { bad "exit code $?: $*"; exit 1; }
}
# A command that has to end with the code and say both texts (grep -E), and has to leave no run behind.
refused() { # code, what was wrong, what would work, words of train ...
    want=$1 wrong=$2 works=$3
    shift 3
    checks=$((checks + 1))
    rm -rf "$d/refused"
    "$retort" train --device "$device" --out "$d/refused" --steps 2 "$@" >/dev/null 2>"$d/err" </dev/null
    code=$?
    [ $code = "$want" ] || bad "$device: exit code $code, expected $want: train $*"
    grep -qE "$wrong" "$d/err" || bad "$device: does not say '$wrong': train $*"
    grep -qE -e "$works" "$d/err" || bad "$device: does not say '$works': train $*"
    [ ! -e "$d/refused/metrics.jsonl" ] || bad "$device: a step was made: train $*"
    sed -n 's/^retort train: /  /p' "$d/err"
}

head -n 24 $prompts/almanac_train.jsonl >"$d/text.jsonl"
must "$retort" logits --device cpu --teacher $teacher --data "$d/text.jsonl" --out "$d/shards" --cache topk=16 --lse 1,2
# 1500 tokens in one sequence
awk 'BEGIN { printf "{\"input_ids\":[5"; for (i = 0; i < 1499; i++) printf ",%d", 5 + i % 900; print "]}" }' >"$d/long.jsonl"

refusals() {
    refused 1 'of the tokenizer' 'retort retarget' --student examples/crossing_student --data "$d/shards" --w-kl 1
    refused 1 'stores the 16 likeliest' '--top-k 16' --student $student --data "$d/shards" --w-kl 1 --top-k 64
    refused 1 'T = 3 is not stored \(stored: 1, 2\)' '--lse 3' --student $student --data "$d/shards" --w-kl 1 --kd-temperature 3
    refused 1 'has 1500 tokens, the student takes 1024' '--max-length 1024' --student $student --data "$d/long.jsonl"
    refused 1 'text without teacher rows' '--w-kl 0' --student $student --data "$d/text.jsonl" --w-kl 1
    refused 5 'training needs' "--$memory [0-9.]+[KMG]" --student $student --data "$d/text.jsonl" --$memory 1M
}

# ---- a run that is killed goes on with the same bytes ----
train() { # out, words more; in a shell of its own, which becomes the program
    out=$1
    shift
    exec "$retort" train "$@" --device "$device" --student $student --data "$d/shards" --out "$out" --w-ce 0.5 --w-kl 0.5 --kd-temperature 2 --steps 60 --batch-tokens 2048 \
        --micro-tokens 512 --max-length 512 --lr 1e-3 --seed 3 --save-every 10 >/dev/null 2>"$d/err" </dev/null
}
steps() { # run
    if [ -f "$1/metrics.jsonl" ]; then wc -l <"$1/metrics.jsonl"; else echo 0; fi
}
# everything of metrics.jsonl but what a clock or the machine says
losses() {
    sed 's/"seconds":.*//' "$1/metrics.jsonl"
}
killed() {
    (train "$d/whole-$device") || bad "$device: train ended with $?"
    # two runs measure their products each for itself, and may find others the fastest: this one begins with the choices of that one
    if [ -f "$d/whole-$device/products.txt" ]; then
        mkdir "$d/killed-$device"
        cp "$d/whole-$device/config.json" "$d/whole-$device/products.txt" "$d/killed-$device/"
    fi
    for far in 5 23 41; do
        # what a machine has to give may change between the parts
        more="--loader-threads 0"
        [ $far != 23 ] || more=$changed
        (train "$d/killed-$device" $more) &
        pid=$!
        tries=0
        while kill -0 $pid 2>/dev/null && [ "$(steps "$d/killed-$device")" -lt $far ] && [ $tries -lt 6000 ]; do
            sleep 0.01
            tries=$((tries + 1))
        done
        kill -9 $pid 2>/dev/null
        wait $pid 2>/dev/null
        echo "  $device: killed behind step $(steps "$d/killed-$device")"
    done
    (train "$d/killed-$device") || bad "$device: train after a kill ended with $?"
    checks=$((checks + 2))
    losses "$d/whole-$device" >"$d/a"
    losses "$d/killed-$device" >"$d/b"
    [ "$(wc -l <"$d/a")" = 60 ] || bad "$device: $(wc -l <"$d/a") steps, expected 60"
    cmp "$d/a" "$d/b" || bad "$device: losses differ after kills"
    cmp "$d/whole-$device/model/model.safetensors" "$d/killed-$device/model/model.safetensors" || bad "$device: the student differs after kills"
}

[ $# -gt 0 ] || set -- cpu cuda
for device in "$@"; do
    memory=memory changed="--threads 1 --recompute 3"
    if [ "$device" = cuda ]; then
        memory=gpu-memory changed="--gpu-memory 14G --recompute 2"
        if ! "$retort" train --device cuda --student $student --data "$d/text.jsonl" --out "$d/none" --dry-run >/dev/null 2>"$d/err"; then
            echo "SKIP cuda: $(tail -n 1 "$d/err")"
            continue
        fi
    fi
    refusals
    killed
done
echo "$checks checks, $failed failed"
[ $failed = 0 ]
