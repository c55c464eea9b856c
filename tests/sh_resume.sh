#!/bin/sh
# Killed or interrupted at any moment, the same command goes on and yields the same bytes. Argument: the build directory.
set -u
retort=$1/retort
teacher=examples/tiny_teacher
student=examples/tiny_student
d=$(mktemp -d /tmp/retort-resume-XXXXXX)
trap 'rm -rf "$d"' EXIT
failed=0 checks=0

bad() {
    failed=$((failed + 1))
    echo "FAILED: $1"
    tail -n 6 "$d/err"
}
# Starts a command and sends it a signal as soon as it has come far enough (see progress); $code gets its exit code. A command that was
# quicker than the signal is no failure: it is done then.
strike() { # signal, directory, progress to wait for, command ...
    sig=$1 out=$2 far=$3
    shift 3
    "$@" >/dev/null 2>"$d/err" </dev/null &
    pid=$!
    tries=0
    while kill -0 "$pid" 2>/dev/null && [ "$(progress "$out")" -lt "$far" ] && [ $tries -lt 3000 ]; do
        sleep 0.01
        tries=$((tries + 1))
    done
    kill "-$sig" "$pid" 2>/dev/null
    wait "$pid" 2>/dev/null
    code=$?
}
finish() { # command ...
    checks=$((checks + 1))
    "$@" >/dev/null 2>"$d/err" </dev/null || bad "exit code $?: $*"
}
equal() { # what, directory, directory, files ...
    what=$1 a=$2 b=$3
    shift 3
    for f in "$@"; do
        checks=$((checks + 1))
        cmp -s "$a/$f" "$b/$f" || bad "$what: $f differs"
    done
}
left_over() { # directory
    checks=$((checks + 1))
    [ -z "$(find "$1" -name '*.tmp*')" ] || bad "a temporary file is left: $(find "$1" -name '*.tmp*')"
}

# ---- logits: shards of a set, windows that end inside shards ----
sed -n 1,20p examples/prompts/almanac_train.jsonl >"$d/text.jsonl"
progress() { find "$1" -name 'rows-*.msgpack' 2>/dev/null | wc -l; }
logits() { # out
    set -- "$retort" logits --teacher "$teacher" --data "$d/text.jsonl" --out "$1" --cache topk=4 --max-length 64 --overlong split \
        --rows-per-shard 300 --window 192
    "$go" "$@"
}
plain() { finish "$@"; }
killed() { strike 9 "$where" "$far" "$@"; }
interrupted() { strike INT "$where" "$far" "$@"; }
go=plain
logits "$d/set"
files=$(cd "$d/set" && ls identity.json manifest.jsonl expert_load.json rows-*)
[ "$(progress "$d/set")" -ge 5 ] || bad "logits: the set should have several shards"
for far in 0 1 3 6; do # 0: at once
    where=$d/killed-$far go=killed
    logits "$where"
    [ "$code" = 137 ] || [ "$code" = 0 ] || bad "logits killed at $far: exit code $code"
    go=plain
    logits "$where"
    equal "logits killed at shard $far" "$d/set" "$where" $files
    left_over "$where"
done
where=$d/again
for far in 1 2 4; do # killed in each of its resumes
    go=killed
    logits "$where"
done
go=interrupted far=5
logits "$where"
[ "$code" = 130 ] || [ "$code" = 0 ] || bad "logits interrupted: exit code $code"
go=plain
logits "$where"
equal "logits killed again and again" "$d/set" "$where" $files
# what a crash may leave behind: a torn manifest line, a temporary file, a shard that is in no manifest
where=$d/torn
cp -r "$d/set" "$where"
head -n 2 "$d/set/manifest.jsonl" >"$where/manifest.jsonl"
printf '{"file":"rows-0000' >>"$where/manifest.jsonl"
echo rubbish >"$where/rows-000003.msgpack.tmp"
echo rubbish >"$where/rows-000004.msgpack"
rm "$where/expert_load.json" # behind the shards: its windows are counted again
checks=$((checks + 1))
"$retort" cat "$where" --limit 1 >/dev/null 2>"$d/err" || bad "logits: what is published before a torn line is not read"
logits "$where"
equal "logits after a torn manifest" "$d/set" "$where" $files

# ---- two writers of one directory ----
checks=$((checks + 1))
where=$d/two far=1
go=strike_two
strike_two() {
    "$@" >/dev/null 2>&1 </dev/null &
    pid=$!
    while kill -0 "$pid" 2>/dev/null && [ "$(progress "$where")" -lt 1 ]; do sleep 0.01; done
    if kill -STOP "$pid" 2>/dev/null; then
        "$@" >/dev/null 2>"$d/err" </dev/null
        code=$?
        kill -CONT "$pid"
        wait "$pid"
        first=$?
        [ "$code" = 1 ] && [ "$first" = 0 ] && grep -q 'another process' "$d/err" || [ "$code" = 0 ] || bad "two writers: exit codes $first and $code"
    fi
}
logits "$where"
equal "two writers" "$d/set" "$where" $files

# ---- logits: within a window, behind its last complete layer ----
# windows begun times layers, and the layers of the one that is under way, by the header of its saved state
progress() {
    for f in "$1"/.window-*/state; do
        [ -e "$f" ] && head -c 400 "$f" 2>/dev/null | tr -d '\0' | sed -n 's/.*"window":\([0-9]*\),"layer":\([0-9]*\).*/\1 \2/p'
    done | awk '{ n = $1 * 4 + $2; m = n > m ? n : m } END { print m + 0 }'
}
layers() { # out, more ...
    out=$1
    shift
    set -- "$retort" logits --teacher "$teacher" --data "$d/text.jsonl" --out "$out" --cache topk=4 --max-length 64 --overlong split \
        --features 2:128,final --rows-per-shard 500 --window 1500 --save-state layer "$@"
    "$go" "$@"
}
said() { # pattern, what
    checks=$((checks + 1))
    grep -q "$1" "$d/err" || bad "$2: stderr lacks '$1'"
}
no_states() { # directory
    checks=$((checks + 1))
    [ -z "$(find "$1" -name '.window-*' -o -name '*.hold')" ] || bad "a window's state is left: $(find "$1" -name '.window-*' -o -name '*.hold')"
}
go=plain
layers "$d/layers"
files=$(cd "$d/layers" && ls identity.json manifest.jsonl expert_load.json rows-*)
no_states "$d/layers"
for far in 1 3 5 6 10; do
    where=$d/layers-$far go=killed
    layers "$where"
    at=$code
    go=plain
    layers "$where"
    [ "$at" = 137 ] && said 'goes on after layer' "logits killed after $far layers"
    equal "logits killed after $far layers" "$d/layers" "$where" $files
    left_over "$where"
    no_states "$where"
done
where=$d/layers-again
for far in 1 2 3 5 7 9 11; do # killed in each of its resumes
    go=killed
    layers "$where"
done
go=interrupted far=10
layers "$where"
[ "$code" = 130 ] || [ "$code" = 0 ] || bad "logits interrupted within a window: exit code $code"
[ "$code" = 130 ] && said 'interrupted .*layer' "logits interrupted within a window"
go=plain
layers "$where"
equal "logits killed within windows again and again" "$d/layers" "$where" $files
no_states "$where"
# two devices, of which each has its window; killed, then ended by one device
where=$d/layers-two far=2 go=killed device=
"$retort" logits --teacher "$teacher" --data "$d/text.jsonl" --out "$d/none" --gpus 2 --dry-run >/dev/null 2>&1 || device="--device cpu"
layers "$where" --gpus 2 $device
go=plain
layers "$where" $device
equal "logits killed on two devices" "$d/layers" "$where" $files
# a state that was damaged or is of another teacher is said and not used
where=$d/layers-bad far=2 go=killed
layers "$where"
if [ "$code" = 137 ]; then
    for f in "$where"/.window-*/state; do printf Q | dd of="$f" bs=1 seek=9000 conv=notrunc 2>/dev/null; done
    go=plain
    layers "$where"
    said 'saved state is not used.*damaged' 'logits with a damaged state'
    equal "logits with a damaged state" "$d/layers" "$where" $files
fi
# features that do not fit into memory leave for files; a resume with more memory holds them: the plan stays, and the bytes are the same
wide() { # out, more ...
    out=$1
    shift
    set -- "$retort" logits --teacher "$teacher" --data "$d/text.jsonl" --out "$out" --cache topk=4 --max-length 64 --overlong split \
        --features 0,1,2,3,final --rows-per-shard 500 --window 3500 --save-state layer "$@"
    "$go" "$@"
}
answer() { "$@" >"$d/answer" 2>/dev/null </dev/null; }
go=answer
tight=60
while [ $tight -lt 120 ]; do
    wide "$d/none" --quiet --dry-run --json --memory ${tight}M
    grep -q '"features_spilled":true' "$d/answer" && break
    tight=$((tight + 1))
done
checks=$((checks + 1))
[ $tight -lt 120 ] || bad "no --memory makes features leave for files"
where=$d/spill-kept far=1 go=killed
wide "$where" --memory ${tight}M
go=finish
wide "$where"
where=$d/spill far=2 go=killed
wide "$where" --memory ${tight}M
go=finish
wide "$where" --memory ${tight}M
said 'features: .*in files' 'logits in little memory'
equal "logits with features in files" "$d/spill-kept" "$where" $(cd "$d/spill-kept" && ls manifest.jsonl rows-*)
no_states "$where"

# ---- train: checkpoints, metrics, the model ----
sed -n 's/^\(.\{150\}\).*/\1"}/p' examples/prompts/almanac_train.jsonl | head -n 40 >"$d/short.jsonl"
progress() { find "$1" -name MANIFEST -path '*/ckpt-*' 2>/dev/null | sed 's/.*ckpt-0*//; s/[^0-9].*//' | sort -n | tail -n 1 | grep . || echo 0; }
train() { # out
    set -- "$retort" train --student "$student" --data "$d/short.jsonl" --out "$1" --steps 24 --batch-tokens 256 --micro-tokens 128 --max-length 128 \
        --save-every 4 --seed 3
    "$go" "$@"
}
# metrics without what depends on the clock and on the process
steps() { sed 's/,"\(tokens_per_second\|seconds\|time\|wall\|mfu\|memory\|data_wait\)[a-z_]*":[^,}]*//g' "$1/metrics.jsonl" >"$1/metrics.stripped"; }
go=plain
train "$d/run"
steps "$d/run"
for far in 1 4 8 16; do
    where=$d/run-$far go=killed
    train "$where"
    go=plain
    train "$where"
    steps "$where"
    equal "train killed at step $far" "$d/run" "$where" model/model.safetensors model/config.json ckpt-00000024/model.safetensors \
        ckpt-00000024/adam_m.safetensors ckpt-00000024/adam_v.safetensors metrics.stripped
    left_over "$where"
done
where=$d/run-int go=interrupted far=4
train "$where"
[ "$code" = 130 ] || [ "$code" = 0 ] || bad "train interrupted: exit code $code"
go=plain
train "$where"
steps "$where"
equal "train interrupted" "$d/run" "$where" model/model.safetensors metrics.stripped
# a damaged checkpoint: the one before it is taken, and said
where=$d/run-bad
cp -r "$d/run" "$where"
rm -r "$where/model" "$where/run.json"
printf 'x' | dd of="$where/ckpt-00000024/adam_v.safetensors" bs=1 seek=3000 conv=notrunc 2>/dev/null
train "$where"
grep -q 'adam_v.safetensors.*damaged' "$d/err" || bad "train: a damaged checkpoint is not said"
equal "train after a damaged checkpoint" "$d/run" "$where" model/model.safetensors

# ---- traces ----
sed -n 1,8p examples/prompts/arithmetic_train.jsonl >"$d/prompts.jsonl"
progress() { cat "$1/traces.jsonl" 2>/dev/null | wc -l; }
traces() { # out
    set -- "$retort" traces --teacher "$teacher" --prompts "$d/prompts.jsonl" --out "$1" --samples 3 --max-tokens 60 --slots 6 --seed 5
    "$go" "$@"
}
go=plain
traces "$d/traces"
LC_ALL=C sort "$d/traces/traces.jsonl" >"$d/traces/sorted"
for far in 1 5 15; do
    where=$d/traces-$far go=killed
    traces "$where"
    go=plain
    traces "$where"
    LC_ALL=C sort "$where/traces.jsonl" >"$where/sorted"
    equal "traces killed at $far" "$d/traces" "$where" sorted
done
where=$d/traces-int go=interrupted far=3
traces "$where"
[ "$code" = 130 ] || [ "$code" = 0 ] || bad "traces interrupted: exit code $code"
go=plain
traces "$where"
LC_ALL=C sort "$where/traces.jsonl" >"$where/sorted"
equal "traces interrupted" "$d/traces" "$where" sorted

echo "$checks checks, $failed failed"
[ "$failed" = 0 ]
