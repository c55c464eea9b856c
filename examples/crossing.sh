#!/bin/sh
# Soft labels across tokenizers: the embedded teacher taught to a student that shares neither its vocabulary nor its template.
# usage: crossing.sh path/to/retort [OUT [SEEDS [DEVICE]]]
set -eu
retort=$1
out=${2:-build/crossing}
seeds=${3:-3}
device=${4:-auto}
here=examples
teacher=$here/tiny_teacher
student=$here/crossing_student
prompts=$here/prompts
start=$(date +%s)

head() {
    printf '\n\033[1m== %s\033[0m  [%ss]\n' "$1" $(($(date +%s) - start))
}
run() {
    case $1 in
    traces | logits | train | eval | experiment) [ "$device" = auto ] || set -- "$@" --device "$device" ;;
    esac
    printf '$ retort %s\n' "$*"
    "$retort" "$@"
}

rm -rf "$out"
mkdir -p "$out"

# 256 entries, not 64: inside a teacher token only those that agree with the bytes said already count, and an almanac's next word is far from certain.
head 'The teacher speaks and says what it thinks of every token: top-256 logits, and how likely a word ends there'
cat $prompts/diagnosis_train.jsonl $prompts/arithmetic_train.jsonl >"$out/prompts.jsonl"
run traces --teacher $teacher --prompts "$out/prompts.jsonl" --out "$out/traces" --temperature 1 --top-p 1 --max-tokens 160 --seed 1
cat "$out/traces/traces.jsonl" $prompts/almanac_train.jsonl >"$out/train.jsonl"
run logits --teacher $teacher --data "$out/train.jsonl" --out "$out/shards" --cache topk=256 --boundary

head 'These rows are of another tokenizer: three ways into that of the student'
for mode in exact strict alm; do
    run retarget --shards "$out/shards" --student $student --out "$out/$mode" --mode $mode
done

head 'The same for held-out problems and texts, from whole rows: what the students are measured on'
run traces --teacher $teacher --prompts $prompts/diagnosis_eval.jsonl --out "$out/eval-traces" --temperature 1 --top-p 1 --max-tokens 160 --seed 2 --quiet
cp "$out/eval-traces/traces.jsonl" "$out/diagnosis.jsonl"
cp $prompts/almanac_eval.jsonl "$out/almanac.jsonl"
for family in diagnosis almanac; do
    run logits --teacher $teacher --data "$out/$family.jsonl" --out "$out/whole-$family" --cache topk=1016 --quiet
    run retarget --shards "$out/whole-$family" --student $student --out "$out/$family" --quiet >/dev/null
done

# NAME SEED DATA WEIGHTS...: trains and measures one student
arm() {
    name=$1
    seed=$2
    data=$3
    shift 3
    run train --student $student --data "$data" --out "$out/runs/$name-$seed" --name "$name-$seed" --arm "$name" --steps 1000 --batch-tokens 1024 --lr 2e-3 \
        --seed "$seed" --save-every 0 --quiet "$@"
    for set in "$out/diagnosis" "$out/almanac" $prompts/diagnosis_eval.jsonl $prompts/arithmetic_eval.jsonl; do
        "$retort" eval --student "$out/runs/$name-$seed" --data "$set" --temperature 0 --max-tokens 200 --quiet >/dev/null
    done
}

head "Five students from one initialisation, on the same tokens in the same order, $seeds times"
seed=1
while [ "$seed" -le "$seeds" ]; do
    arm hard "$seed" "$out/exact" --w-ce 1 --w-kl 0
    arm exact "$seed" "$out/exact" --w-ce 1 --w-kl 1 --ce rest
    arm half "$seed" "$out/exact" --w-ce 0.5 --w-kl 0.5
    arm strict "$seed" "$out/strict" --w-ce 1 --w-kl 1 --ce rest
    arm alm "$seed" "$out/alm" --w-ce 0 --w-alm 1
    seed=$((seed + 1))
done

head 'The comparison'
run compare "$out"/runs/hard-* "$out"/runs/exact-* "$out"/runs/half-* "$out"/runs/strict-* "$out"/runs/alm-* --html "$out/report.html"
printf '\nreport: %s\nall of it took %s seconds\n' "$out/report.html" $(($(date +%s) - start))
