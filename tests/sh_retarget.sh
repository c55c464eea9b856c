#!/bin/sh
# retort retarget from the command line, on the embedded teacher: every command takes what it makes; a kill changes nothing; what is refused.
# Argument: the build directory.
set -u
here=$(pwd)
retort=$here/$1/retort
teacher=examples/tiny_teacher
student=examples/crossing_student
d=$(mktemp -d /tmp/retort-retarget-XXXXXX)
trap 'rm -rf "$d"' EXIT
failed=0

bad() {
    failed=$((failed + 1))
    echo "FAILED: $*"
    tail -n 5 "$d/err"
}
run() { # command ...
    "$retort" "$@" >"$d/out" 2>"$d/err" </dev/null || bad "exit code $?: retort $*"
}
refuse() { # exit code, pattern, command ...
    code=$1 pattern=$2
    shift 2
    "$retort" "$@" >"$d/out" 2>"$d/err" </dev/null
    got=$?
    [ $got = "$code" ] || bad "exit code $got, expected $code: retort $*"
    grep -qE -e "$pattern" "$d/err" || bad "stderr lacks '$pattern': retort $*"
}

# two conversations, a text, and a line whose accent is a combining one
cat >"$d/data.jsonl" <<'LINES'
{"prompt":"Add 62 and 41.","completion":"<think>\nAdd the tens: 60 and 40 make 100. Then 2 and 1 make 3.\n</think>\n\n\\boxed{103}"}
{"prompt":"Add 12 and 7.","completion":"<think>\n12 and 7 make 19.\n</think>\n\n\\boxed{19}"}
{"text":"The quick brown fox jumps over 13 lazy dogs. Most of them say nothing, and would not."}
LINES
printf '{"prompt":"Say it.","completion":"<think>\\nWell.\\n</think>\\n\\nCafe\314\201"}\n' >>"$d/data.jsonl"
run logits --teacher $teacher --data "$d/data.jsonl" --out "$d/shards" --cache topk=64 --lse 1,2 --features 2
[ -f "$d/shards/teacher/tokenizer.json" ] || bad "logits leaves no copy of the tokenizer"

for mode in exact strict; do
    run retarget --shards "$d/shards" --student $student --out "$d/$mode" --mode $mode
    grep -q '^sequences  3 of 4' "$d/out" || bad "the report of $mode"
    grep -q 'not in Unicode NFC' "$d/out" || bad "the line in NFD is not counted"
    run cat "$d/$mode"
    [ "$(wc -l <"$d/out")" -gt 20 ] || bad "cat of $mode"
    grep -q '4294967295\|inf' "$d/out" && bad "cat shows empty entries"
    run inspect "$d/$mode"
    grep -q "mode *$mode" "$d/out" || bad "inspect does not say that the set is retargeted"
    run inspect "$d/$mode" --json
    run doctor --student $student --shards "$d/$mode"
    run doctor --teacher $teacher --shards "$d/$mode" --rescore 4 --device cpu
    grep -q 'WARN shards.rescored: not checked: rows that are retargeted' "$d/out" || bad "doctor does not say that $mode cannot be rescored"
    grep -q 'shards.template\|shards.teacher_tokenizer' "$d/out" && bad "doctor takes $mode for another teacher's"
    run train --student $student --data "$d/$mode" --out "$d/run-$mode" --w-ce 0.5 --w-kl 0.5 --w-feature 0.1 --steps 2 --batch-tokens 256
    run eval --student "$d/run-$mode" --data "$d/$mode"
    grep -q 'KL at T' "$d/out" || bad "eval of $mode has no KL"
    refuse 1 'retargeted.*T = 1' train --student $student --data "$d/$mode" --out "$d/hot" --kd-temperature 2 --w-kl 1 --steps 1
    refuse 1 'retargeted.*T = 1' train --student $student --data "$d/$mode" --out "$d/hot" --kd-temperature 2 --tail renorm --w-kl 1 --steps 1
    refuse 1 'retargeted.*T = 1' train --student $student --data "$d/$mode" --out "$d/hot" --teacher-temperature 2 --tail renorm --w-kl 1 --steps 1
    [ -e "$d/hot/metrics.jsonl" ] && bad "refused after a step"
    refuse 1 'tokenizer' train --student examples/tiny_student --data "$d/$mode" --out "$d/other" --w-kl 1 --steps 1
done

# the residual of a row is not to be left out; strict rows leave out by design, which is said
refuse 1 'retargeted .exact.*--tail renorm would drop their residual' train --student $student --data "$d/exact" --out "$d/bare" --tail renorm --w-kl 1 --steps 1
refuse 1 'retargeted .exact.*--tail renorm' train --student $student --data "$d/exact" --out "$d/bare" --tail renorm --w-kl 1 --steps 1 --dry-run
[ -e "$d/bare/metrics.jsonl" ] && bad "refused after a step"
run train --student $student --data "$d/strict" --out "$d/shared" --tail renorm --w-kl 1 --steps 1
grep -q 'a row that lists one token teaches nothing' "$d/err" || bad "no warning of strict rows with --tail renorm"
run train --student $student --data "$d/exact" --out "$d/labels" --tail renorm --w-ce 1 --w-kl 0 --steps 1

# likelihoods of spans: without boundaries in the set --gamma does nothing, which is said
run retarget --shards "$d/shards" --student $student --out "$d/spans" --mode alm --gamma 0.5
grep -q 'without --boundary: --gamma 0.5 is not used' "$d/err" || bad "--gamma is ignored in silence"

# one tokenizer on both sides: the same lines, states too
run retarget --shards "$d/shards" --student examples/tiny_student --out "$d/same" --json
"$retort" cat "$d/shards" --features >"$d/a" && "$retort" cat "$d/same" --features >"$d/b" && cmp -s "$d/a" "$d/b" || bad "rows of one tokenizer differ"
run train --student examples/tiny_student --data "$d/same" --out "$d/run-same" --tail renorm --w-kl 1 --steps 1 # they are the teacher's own
run train --student examples/tiny_student --data "$d/same" --out "$d/run-hot" --kd-temperature 2 --w-kl 1 --steps 1

# the same bytes after a kill, whatever --threads; nothing to do the third time
run retarget --shards "$d/shards" --student $student --out "$d/one" --rows-per-shard 20 --threads 1
for i in 1 2 3 4 5 6; do
    "$retort" retarget --shards "$d/shards" --student $student --out "$d/killed" --rows-per-shard 20 --threads 2 >/dev/null 2>&1 &
    pid=$!
    sleep 0.0$i
    kill -9 $pid 2>/dev/null
    wait $pid 2>/dev/null
done
run retarget --shards "$d/shards" --student $student --out "$d/killed" --rows-per-shard 20 --threads 2
for f in "$d"/one/rows-*.msgpack "$d/one/manifest.jsonl" "$d/one/identity.json"; do
    cmp -s "$f" "$d/killed/$(basename "$f")" || bad "$(basename "$f") differs after kills"
done
cp "$d/out" "$d/first"
run retarget --shards "$d/shards" --student $student --out "$d/killed" --rows-per-shard 20
cmp -s "$d/out" "$d/first" || bad "the report of a finished set differs"

# a student without a template: said before anything is written, so that the way out takes the same --out
mkdir "$d/bare-student"
cp $student/config.json $student/model.safetensors $student/tokenizer.json "$d/bare-student"
sed '/"chat_template"/d; s/"Qwen2Tokenizer",/"Qwen2Tokenizer"/' $student/tokenizer_config.json >"$d/bare-student/tokenizer_config.json"
grep -q chat_template "$d/bare-student/tokenizer_config.json" && bad "the template is still there"
refuse 3 'line 1 is a conversation.*--template NAME' retarget --shards "$d/shards" --student "$d/bare-student" --out "$d/named"
[ -e "$d/named" ] && bad "refused after something was written"
run retarget --shards "$d/shards" --student "$d/bare-student" --template qwen3 --out "$d/named"

# refused
refuse 1 'another command.*mode' retarget --shards "$d/shards" --student $student --out "$d/exact" --mode strict
refuse 1 'retargeted already' retarget --shards "$d/exact" --teacher $student --student $student --out "$d/twice"
refuse 1 'tokenizer .*--teacher' retarget --shards "$d/shards" --teacher $student --student $student --out "$d/wrong"
refuse 1 'another command' retarget --shards "$d/shards" --student $student --out "$d/shards"
refuse 3 'identity.json|no row shards|not.*shards' retarget --shards "$d" --student $student --out "$d/no"
mv "$d/shards/teacher" "$d/away"
refuse 2 '--teacher DIR says where' retarget --shards "$d/shards" --student $student --out "$d/no"
run retarget --shards "$d/shards" --teacher $teacher --student $student --out "$d/told" --dry-run
[ -e "$d/told" ] && bad "--dry-run left something behind"
[ $failed = 0 ]
