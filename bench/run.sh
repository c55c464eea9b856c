#!/bin/sh
# All measurements, in a few minutes:  sh bench/run.sh BUILD        (make bench)
#
# PAIRS (7) is the number of interleaved pairs, THREADS (2) those of both sides; TMPDIR needs 2.5 GB.
set -u
build=$1
pairs=${PAIRS:-7}
threads=${THREADS:-2}
work=$(mktemp -d "${TMPDIR:-/tmp}/retort-bench.XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT INT TERM
failed=0
show() {
    echo "\$ $*"
    "$@" || { echo "FAILED: $*"; failed=$((failed + 1)); }
    echo
}

echo "machine: $(uname -sm), $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(nproc) cores, $(awk '/MemTotal/ { printf "%.0f GiB", $2 / 1048576 }' /proc/meminfo), load $(cut -d' ' -f1 /proc/loadavg)"
echo "commit:  $(git describe --always --dirty 2>/dev/null || echo unknown)"
echo
echo "== scoring: the share of plain sgemm that a teacher reaches"
show "$build/bench_teacher_score" --teacher examples/tiny_teacher --sequences 16 --length 256 --pairs "$pairs" --threads "$threads"
show "$build/bench_make_teacher" --out "$work/teacher"
show "$build/bench_teacher_score" --teacher "$work/teacher" --pairs "$pairs" --threads "$threads"
rm -rf "$work/teacher"
echo "== training: the share of plain sgemm that a step reaches"
show "$build/bench_student_sgemm" --model 10m --pairs "$pairs" --threads "$threads"
show "$build/bench_student_sgemm" --model 135m --pairs "$pairs" --threads "$threads"
echo "== training along the way of train: shards on disk, loader, packing, steps; then the loader alone"
show "$build/bench_student_train" --model 10m --device auto --length 256 --batch-tokens 4096 --steps 2 --threads "$threads"
show "$build/bench_student_train" --model 0.5b --device cpu --loader --loader-threads 1 --batch-tokens 65536 --steps 4 --loss kd
echo "== memory: a checkpoint eight times larger than --memory"
show sh bench/memory.sh "$build"
echo "== shards: bytes a token"
show sh bench/shards.sh "$build"
echo "== shards: microseconds a token of writing them"
show "$build/bench_shards_put" "$work/put"
show "$build/bench_shards_put" "$work/put" 64 2048 7168
echo "== two tokenizers: what of a teacher's rows crosses"
show "$build/bench_retarget_overlap" examples/tiny_teacher examples/crossing_student examples/prompts/almanac_train.jsonl
echo "== two tokenizers: rows a second, from shards to shards"
mkdir "$work/retarget"
show "$build/bench_retarget" examples/tiny_teacher examples/crossing_student "$work/retarget" examples/prompts/almanac_train.jsonl
[ $failed = 0 ]
