#!/bin/sh
# Peak memory of scoring a checkpoint about eight times larger than --memory, and whether its rows are those of a run with plenty.
#
#     sh bench/memory.sh BUILD        BUILD: directory with retort and bench_*;  TMPDIR needs 2.5 GB
#
# Both runs have one --window, since the bytes of rows are promised for equal windows.
set -eu
build=$1
work=$(mktemp -d "${TMPDIR:-/tmp}/retort-memory.XXXXXX")
trap 'rm -rf "$work"' EXIT INT TERM
memory_mib=256
window=1024

# 2.2 GB of FP8 experts in 8 layers
"$build/bench_make_teacher" --out "$work/teacher" --hidden 1024 --layers 9 --moe-inter 768 --experts 112 --top-k 8 --n-group 8 --topk-group 4 \
    --vocab 8192 --shard-bytes 512M >"$work/made"
tail -n 1 "$work/made"
bytes=$(cat "$work"/teacher/*.safetensors | wc -c)
awk 'BEGIN { srand(7); for (s = 0; s < 8; s++) { printf "{\"input_ids\":["; for (i = 0; i < 256; i++) printf "%s%d", i ? "," : "", int(rand() * 8192);
    print "]}" } }' >"$work/ids.jsonl"

score() { # name, memory
    "$build/bench_peak" "$build/retort" logits --device cpu --teacher "$work/teacher" --data "$work/ids.jsonl" --out "$work/$1" --rows all \
        --max-length 256 --window $window --memory "$2" >"$work/$1.out" 2>"$work/$1.err" || { cat "$work/$1.err" >&2; exit 1; }
    tail -n 1 "$work/$1.err"
}
small=$(score small ${memory_mib}M)
large=$(score large 16G)
peak=$(echo "$small" | sed 's/.*peak_kib=\([0-9]*\).*/\1/')
echo "checkpoint $((bytes / 1048576)) MiB, --memory $memory_mib MiB ($((bytes / 1048576 / memory_mib)).$((bytes / 104858 / memory_mib % 10)) times larger)"
echo "  --memory ${memory_mib}M: $small   = $((peak / 1024)) MiB, $((peak * 100 / 1024 / memory_mib)) % of --memory"
echo "  --memory 16G:  $large"
same=yes
for f in "$work"/small/*.msgpack; do
    cmp -s "$f" "$work/large/$(basename "$f")" || same=no
done
[ -n "$(ls "$work"/small/*.msgpack 2>/dev/null)" ] || same=no
echo "  shards of both runs equal, byte for byte: $same"
[ $same = yes ]
[ "$peak" -le $((memory_mib * 1024)) ] || { echo "  peak is above --memory"; exit 1; }
