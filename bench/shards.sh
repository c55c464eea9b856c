#!/bin/sh
# Bytes a token and a row of the shards, scored by the teacher in examples/: top 64 and 16, with and without hidden states, on plain text
# (the almanac) and on questions with worked answers.
#
#     sh bench/shards.sh BUILD [DATA ...]        BUILD: directory with retort;  DATA: JSON lines
set -eu
build=$1
shift
teacher=examples/tiny_teacher
work=$(mktemp -d "${TMPDIR:-/tmp}/retort-shards.XXXXXX")
trap 'rm -rf "$work"' EXIT INT TERM
if [ $# = 0 ]; then
    # the almanac as it is; answers after their questions as plain text, so that every row is stored
    cp examples/prompts/almanac_eval.jsonl "$work/almanac.jsonl"
    set -- "$work/almanac.jsonl"
    if "$build/retort" traces --help >/dev/null 2>&1; then
        "$build/retort" traces --teacher $teacher --prompts examples/prompts/arithmetic_eval.jsonl --out "$work/traces" --samples 1 \
            --temperature 0.6 --seed 1 >/dev/null 2>"$work/traces.err" && set -- "$@" "$work/traces/traces.jsonl"
    fi
fi
printf '  %-24s %-28s %8s %8s %10s %8s %8s\n' data options tokens rows bytes a_token a_row
for data in "$@"; do
    for options in "--cache topk=64" "--cache topk=16" "--cache topk=64 --lse 0.6,1,2" "--cache topk=64 --features 2,final:64" \
        "--cache topk=64 --features final"; do
        rm -rf "$work/set"
        # shellcheck disable=SC2086
        "$build/retort" logits --device cpu --teacher $teacher --data "$data" --out "$work/set" $options >/dev/null 2>"$work/err" ||
            { cat "$work/err" >&2; exit 1; }
        bytes=$(cat "$work"/set/*.msgpack | wc -c)
        # "..., N sequences, M tokens, ..." and "DIR: N sequences, M rows in ..."
        tokens=$(sed -n 's/^data: .* sequences, \([0-9]*\) tokens.*/\1/p' "$work/err")
        rows=$(sed -n 's/^.*: [0-9]* sequences, \([0-9]*\) rows in .*/\1/p' "$work/err")
        printf '  %-24s %-28s %8s %8s %10s %8s %8s\n' "$(basename "$data")" "$(echo "$options" | sed 's/--cache //; s/--//g')" "$tokens" "$rows" \
            "$bytes" "$(awk "BEGIN { printf \"%.1f\", $bytes / $tokens }")" "$(awk "BEGIN { printf \"%.1f\", $bytes / $rows }")"
    done
done
