#!/bin/sh
# The main job on the embedded teacher, step by step, with the commands it runs. usage: demo.sh path/to/retort [OUT [DEVICE]]
set -eu
retort=$1
out=${2:-build/demo}
device=${3:-auto}
here=examples
teacher=$here/tiny_teacher
student=$here/tiny_student
prompts=$here/prompts
start=$(date +%s)

head() {
    printf '\n\033[1m== %s\033[0m  [%ss]\n' "$1" $(($(date +%s) - start))
}
run() {
    case $1 in
    traces | logits | train | eval) [ "$device" = auto ] || set -- "$@" --device "$device" ;;
    esac
    printf '$ retort %s\n' "$*"
    "$retort" "$@"
}

rm -rf "$out"
mkdir -p "$out"

head 'The teacher: 7.3M parameters in the published layout of DeepSeek-R1'
run inspect $teacher

head 'Reasoning traces for 250 diagnoses and 200 sums, sampled as the teacher speaks (T = 1)'
cat $prompts/diagnosis_train.jsonl $prompts/arithmetic_train.jsonl >"$out/prompts.jsonl"
run traces --teacher $teacher --prompts "$out/prompts.jsonl" --out "$out/traces" --temperature 1 --top-p 1 --max-tokens 160 --seed 1

head 'Which of them are right? (a diagnosis is a draw from the posterior: about half name the most probable cause)'
run filter --data "$out/traces" --out "$out/filtered" --verify boxed

head 'What the teacher thinks of every token: top-64 logits, exact tails at T = 1 and 2, states of two layers, in one pass'
cat "$out/traces/traces.jsonl" $prompts/almanac_train.jsonl >"$out/train.jsonl"
cat "$out/filtered/accepted.jsonl" $prompts/almanac_train.jsonl >"$out/verified.jsonl"
run logits --teacher $teacher --data "$out/train.jsonl" --out "$out/shards" --cache topk=64 --lse 1,2 --features 2,final

head 'The same for held-out problems and texts: what the students are measured on'
run traces --teacher $teacher --prompts $prompts/diagnosis_eval.jsonl --out "$out/eval-traces" --temperature 1 --top-p 1 --max-tokens 160 --seed 2 --quiet
cp "$out/eval-traces/traces.jsonl" "$out/diagnosis.jsonl"
for family in diagnosis almanac; do
    [ $family = almanac ] && cp $prompts/almanac_eval.jsonl "$out/almanac.jsonl"
    run logits --teacher $teacher --data "$out/$family.jsonl" --out "$out/$family" --cache topk=64 --lse 1,2 --quiet
done

head 'Five students from one initialisation, on the same tokens in the same order'
train() {
    name=$1
    data=$2
    shift 2
    run train --student $student --data "$data" --out "$out/runs/$name" --name "$name" --steps 1000 --batch-tokens 1024 --lr 2e-3 --seed 1 \
        --save-every 0 "$@"
}
train hard "$out/shards" --w-ce 1 --w-kl 0
train verified "$out/verified.jsonl" --w-ce 1 --w-kl 0
train soft "$out/shards" --w-ce 0 --w-kl 1
train half "$out/shards" --w-ce 0.5 --w-kl 0.5
train feature "$out/shards" --w-ce 0 --w-kl 1 --w-feature 0.1

head 'Each student on held-out text (CE, KL to the teacher) and on problems (greedy answers)'
for name in hard verified soft half feature; do
    for data in "$out/diagnosis" "$out/almanac" $prompts/diagnosis_eval.jsonl $prompts/arithmetic_eval.jsonl; do
        run eval --student "$out/runs/$name" --data "$data" --temperature 0 --max-tokens 160 --quiet
    done
done

head 'The comparison'
run compare "$out/runs/hard" "$out/runs/verified" "$out/runs/soft" "$out/runs/half" "$out/runs/feature" --html "$out/report.html"
printf '\nreport: %s\nall of it took %s seconds\n' "$out/report.html" $(($(date +%s) - start))
