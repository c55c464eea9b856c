#!/bin/sh
# The command line: exit codes, what is said and where, bad files, full disks, closed outputs. Argument: the build directory.
set -u
here=$(pwd)
retort=$here/$1/retort
teacher=$here/examples/tiny_teacher
student=$here/examples/tiny_student
d=$(mktemp -d /tmp/retort-cli-XXXXXX)
trap 'rm -rf "$d"' EXIT
failed=0 checks=0

bad() { # what
    failed=$((failed + 1))
    echo "FAILED: $1"
    sed 's/^/    /' "$d/err" | tail -n 6
}
want() { # exit code, pattern of stderr ("" for any), command ...
    code=$1 pattern=$2
    shift 2
    checks=$((checks + 1))
    "$@" >"$d/out" 2>"$d/err" </dev/null
    got=$?
    if [ "$got" != "$code" ]; then
        bad "exit code $got, expected $code: $*"
    elif [ -n "$pattern" ] && ! grep -qE -- "$pattern" "$d/err"; then
        bad "stderr lacks '$pattern': $*"
    elif [ "$code" = 0 ] || [ "$code" = 130 ]; then
        :
    elif [ "$(grep -c '^retort' "$d/err")" != 1 ]; then
        bad "expected one line 'retort ...': $*"
    fi
}
same() { # file, file, what
    checks=$((checks + 1))
    cmp -s "$1" "$2" || bad "$3"
}

commands=$("$retort" --help | sed -n 's/^  \([a-z][a-z]*\)  .*/\1/p')

# ---- usage ----
checks=$((checks + 1))
"$retort" >"$d/out" 2>"$d/err"
[ $? = 2 ] && [ ! -s "$d/out" ] && grep -q '^usage: retort COMMAND' "$d/err" || bad "no arguments: usage on stderr, exit code 2"
want 0 '' "$retort" --help
want 0 '' "$retort" --version
grep -q '^retort .*backends.* cpu' "$d/out" || bad "--version: commit and backends"
want 2 "'trian' is no command; did you mean 'train'" "$retort" trian
want 2 "'zzzzzzzz' is no command.*--help" "$retort" zzzzzzzz
want 2 "unknown option '--teachr'; did you mean '--teacher'" "$retort" logits --teachr x
want 2 "option --threads: '99999' .* from 0 to 4096" "$retort" logits --threads 99999
want 2 "option --threads: '-1'" "$retort" logits --threads=-1
want 2 "option --threads" "$retort" logits --threads two
want 2 "option --gpus: '0'" "$retort" logits --gpus 0
want 2 "option --numerics: .*w8a16\|w8a8" "$retort" logits --numerics fp4
want 2 "option --memory" "$retort" logits --memory 8X
want 2 "--save-state often: expected auto, layer, stop, never, or a number of minutes" "$retort" logits --teacher "$teacher" --data x --out y --save-state often
want 2 "--features: layer 9 does not exist; .* 0 \(embeddings\) to 4, and final" "$retort" logits --teacher "$teacher" --data x --out y --features 2,9
want 2 "--features: '2:32' names a layer again" "$retort" logits --teacher "$teacher" --data x --out y --features 2,2:32
for o in features=4294967298 features=-1 features=2: features=2:0 cache=topk=4294967360 cache=topk=65537; do
    want 2 "--${o%%=*}.*: expected " "$retort" logits --teacher "$teacher" --data x --out y "--$o"
done
for o in cache lse part save-state numerics overlong rows device; do
    want 2 "option --$o: expected .*, found nothing; without the option it is " "$retort" logits --teacher "$teacher" --data x --out y "--$o="
done
want 2 "option --teacher is required" "$retort" logits
want 2 "option --threads" "$retort" logits --threads
want 2 "found 0 arguments; usage: retort inspect" "$retort" inspect
want 2 "found 3 arguments, did not expect 'b'" "$retort" cat a b c
[ -n "$commands" ] || bad "retort --help lists no commands"
for c in $commands; do
    want 0 '' "$retort" "$c" --help
    [ -s "$d/out" ] && [ ! -s "$d/err" ] || bad "$c --help: the help belongs on stdout, and nothing on stderr"
    cp "$d/out" "$d/help"
    for o in $(sed -n 's/^ *\(OPT(\)\{0,1\}{"\([a-z0-9-]*\)", RT_OPT_.*/\2/p' "distill/cmd_$c.c"); do
        checks=$((checks + 1))
        grep -qE -- "^  --$o( |\$)" "$d/help" || bad "$c --help does not mention --$o"
    done
    for o in device=cpu threads=1 seed=1 memory=1G gpu-memory=1G gpus=2 config=x json dry-run verbose quiet help; do # listed, or refused
        grep -qE -- "^  --${o%%=*}( |\$)" "$d/help" || want 2 "unknown option '--${o%%=*}': retort $c " "$retort" "$c" "--$o"
    done
    want 2 "unknown option '--hlep'; did you mean '--help'" "$retort" "$c" --hlep
done

# ---- a little that is right ----
sed -n 's/^\(.\{150\}\).*/\1"}/p' examples/prompts/almanac_train.jsonl | head -n 4 >"$d/short.jsonl"
sed -n 1,6p examples/prompts/almanac_train.jsonl >"$d/text.jsonl"
logits() { # data, out, more ...
    data=$1 out=$2
    shift 2
    "$retort" logits --teacher "$teacher" --data "$data" --out "$out" --cache topk=4 --max-length 64 --overlong split --rows-per-shard 100 "$@"
}
run_logits() { # exit code, pattern, data, out, more ...
    code=$1 pattern=$2
    shift 2
    checks=$((checks + 1))
    logits "$@" >"$d/out" 2>"$d/err" </dev/null
    got=$?
    [ "$got" = "$code" ] || bad "exit code $got, expected $code: logits $*"
    [ -z "$pattern" ] || grep -qE -- "$pattern" "$d/err" || bad "stderr lacks '$pattern': logits $*"
}
run_logits 0 '' "$d/text.jsonl" "$d/set"
[ -s "$d/out" ] && bad "logits: chat on stdout"
run_logits 0 'complete already' "$d/text.jsonl" "$d/set"
want 1 'rows of another command; .*topk=4.*topk=5' "$retort" logits --teacher "$teacher" --data "$d/text.jsonl" --out "$d/set" --cache topk=5 \
    --max-length 64 --overlong split --rows-per-shard 100
run_logits 0 '' "$d/text.jsonl" "$d/none" --dry-run
grep -q '^tokens' "$d/out" || bad "--dry-run prints its plan on stdout"
for word in windows passes read memory shards states operations time; do
    grep -q "^$word " "$d/out" || bad "--dry-run does not say '$word'"
done
[ -e "$d/none" ] && bad "--dry-run made a directory"
run_logits 0 '' "$d/text.jsonl" "$d/none" --dry-run --json
python3 -c 'import json, sys; json.load(open(sys.argv[1]))' "$d/out" 2>/dev/null || command -v python3 >/dev/null || echo "SKIP --json is not parsed: no python3"

# ---- bad files ----
[ -s "$d/set/rows-000001.msgpack" ] || bad "the set should have several shards"
cp -r "$d/set" "$d/cut"
truncate -s -7 "$d/cut/rows-000000.msgpack"
want 3 'rows-000000.msgpack' "$retort" cat "$d/cut"
want 3 'rows-000000.msgpack' "$retort" inspect "$d/cut"
cp -r "$d/set" "$d/flip"
printf '\377' | dd of="$d/flip/rows-000000.msgpack" bs=1 seek=900 conv=notrunc 2>/dev/null
want 3 'rows-000000.msgpack' "$retort" cat "$d/flip"
cp -r "$d/set" "$d/lost"
rm "$d/lost/rows-000001.msgpack"
want 1 'rows-000001.msgpack' "$retort" cat "$d/lost"
sed 's/"sequences":/"sequences":1/' "$d/set/manifest.jsonl" >"$d/flip/manifest.jsonl"
want 3 'manifest.jsonl:1' "$retort" cat "$d/flip"

copy_teacher() { # name
    mkdir -p "$d/$1"
    cp "$teacher"/*.json "$d/$1/"
    ln "$teacher"/*.safetensors "$d/$1/" 2>/dev/null || cp "$teacher"/*.safetensors "$d/$1/"
}
with() { # exit code, pattern, directory of a teacher
    want "$1" "$2" "$retort" logits --teacher "$d/$3" --data "$d/text.jsonl" --out "$d/never" --max-length 64 --overlong split
}
copy_teacher t
sed 's/"deepseek_v3"/"mixtral"/' "$teacher/config.json" >"$d/t/config.json"
with 3 "mixtral" t
sed 's/"hidden_size": [0-9]*/"hidden_size": 136/' "$teacher/config.json" >"$d/t/config.json"
with 3 'expected .*found|found .*expected|136' t
printf '{' >"$d/t/config.json"
with 3 'config.json: column 1' t
: >"$d/t/config.json"
with 3 'config.json' t
rm "$d/t/config.json"
with 1 "config.json.*No such file" t
cp "$teacher/config.json" "$d/t/"
sed 's/"model.layers.1.self_attn.o_proj.weight"/"model.layers.1.self_attn.oops.weight"/' "$teacher/model.safetensors.index.json" >"$d/t/model.safetensors.index.json"
with 3 'oops' t
cp "$teacher/model.safetensors.index.json" "$d/t/"
rm "$d/t/model-00001-of-00002.safetensors"
head -c 100000 "$teacher/model-00001-of-00002.safetensors" >"$d/t/model-00001-of-00002.safetensors"
with 3 'model-00001-of-00002.safetensors' t
: >"$d/t/model-00001-of-00002.safetensors"
with 3 'model-00001-of-00002.safetensors' t

copy_teacher u # a vocabulary without the byte 'a'
sed 's/"a": *\([0-9]*\)/"aaaaaaaa": \1/' "$teacher/tokenizer.json" >"$d/u/tokenizer.json"
with 3 'tokenizer.json.*(byte|0x61|token)' u
printf '[1, 2' >"$d/u/tokenizer.json"
with 3 'tokenizer.json: column 5' u

line() { # exit code, pattern, text of line 2
    head -n 1 "$d/text.jsonl" >"$d/lines.jsonl"
    printf '%b\n' "$3" >>"$d/lines.jsonl"
    run_logits "$1" "$2" "$d/lines.jsonl" "$d/never"
}
line 3 'lines.jsonl:2: .*' 'no JSON'
line 3 'lines.jsonl:2' '{"text": "cut'
line 3 'lines.jsonl:2' '{"text": 5}'
line 3 'lines.jsonl:2' '{"nothing": "known"}'
line 3 'lines.jsonl:2: item 1 of' '{"input_ids": [1, 4000000000]}'
line 3 'lines.jsonl:2: item 1 of' '{"input_ids": [1, 99999]}'
line 3 'lines.jsonl:2' '{"input_ids": [1, -1]}'
line 3 'lines.jsonl:2' '{"input_ids": [1, 2, 3], "loss_mask": [1]}'
line 3 'lines.jsonl:2' '[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[['
line 3 'lines.jsonl:2' '{"text": "\\0377\\0376"}'
: >"$d/empty.jsonl"
run_logits 3 'empty.jsonl' "$d/empty.jsonl" "$d/never"
run_logits 1 'nowhere.jsonl.*No such file' "$d/nowhere.jsonl" "$d/never"
[ -e "$d/never" ] && bad "a command that was refused made its output directory"
for c in "eval --student $student" "traces --teacher $teacher"; do
    want 2 "'--gpus': .* computes on one GPU" "$retort" $c --gpus 2
done
if ! "$retort" logits --teacher "$teacher" --data "$d/text.jsonl" --out "$d/never" --device cuda --dry-run >/dev/null 2>&1; then
    want 5 'gpus 2: found no GPU here; --device cpu --gpus 2' "$retort" train --student "$student" --data "$d/text.jsonl" --out "$d/never" --gpus 2
    run_logits 5 'gpus 2: found no GPU here; --device cpu --gpus 2' "$d/text.jsonl" "$d/never" --gpus 2
fi
run_logits 0 'gpu-memory bounds nothing: the device is cpu' "$d/text.jsonl" "$d/never" --device cpu --gpu-memory 1G --dry-run
run_logits 0 'threads 4096: this machine has' "$d/text.jsonl" "$d/never" --device cpu --threads 4096 --dry-run
if [ "$(nproc)" -le 8 ]; then # devices that are the host are not quicker than it
    for n in 1 64; do
        run_logits 0 '' "$d/text.jsonl" "$d/never" --device cpu --gpus $n --dry-run --json
        sed 's/.*"flops_per_second":\([^,]*\),.*/\1/' "$d/out" >"$d/rate-$n"
    done
    awk "BEGIN { exit !($(cat "$d/rate-64") < 8 * $(cat "$d/rate-1")) }" || bad "64 devices on this host: $(cat "$d/rate-64") FLOP/s, one: $(cat "$d/rate-1")"
fi
printf '{"threads": "many"}' >"$d/conf.json"
want 2 'threads.*many' "$retort" logits --config "$d/conf.json" --teacher x --data y --out z
printf '{"thraeds": 1}' >"$d/conf.json"
want 2 "thraeds.*threads|thraeds" "$retort" logits --config "$d/conf.json" --teacher x --data y --out z

# students
mkdir "$d/s"
cp "$student"/*.json "$student"/*.safetensors "$d/s/"
train() { # exit code, pattern, directory of a student
    want "$1" "$2" "$retort" train --student "$d/$3" --data "$d/short.jsonl" --out "$d/never" --steps 1 --max-length 64
}
sed 's/"model_type": "[a-z0-9]*"/"model_type": "gpt_neox"/' "$student/config.json" >"$d/s/config.json"
train 3 'gpt_neox' s
sed 's/"intermediate_size": [0-9]*/"intermediate_size": 72/' "$student/config.json" >"$d/s/config.json"
train 3 'model.layers.0.mlp' s
cp "$student/config.json" "$d/s/"
head -c 5000 "$student/model.safetensors" >"$d/s/model.safetensors"
train 3 'model.safetensors' s

# ---- --config: lists, and what a run left ----
checks=$((checks + 1))
printf '{"data": ["%s", "%s:0.5"], "steps": 1, "student": "%s", "max-length": 64}' "$d/short.jsonl" "$d/short.jsonl" "$student" >"$d/conf.json"
want 0 'weight 0.5' "$retort" train --config "$d/conf.json" --out "$d/listed"
want 0 'is finished' "$retort" train --config "$d/listed/config.json"
want 0 '' "$retort" train --config "$d/listed/config.json" --out "$d/again" --seed 2
grep -q '"seed": "2"' "$d/again/config.json" && grep -q 'short.jsonl\\n.*:0.5"' "$d/again/config.json" || bad "a run's config.json, and the command line over it"
want 2 "of a run of .retort train., expected those of .retort eval" "$retort" eval --config "$d/listed/config.json"
printf '{"gpus": 2}' >"$d/conf.json"
want 2 "conf.json: unknown option '--gpus'" "$retort" eval --config "$d/conf.json"

# ---- checkpoints as students ----
checks=$((checks + 1))
"$retort" train --student "$student" --data "$d/short.jsonl" --out "$d/run" --steps 2 --save-every 1 --max-length 64 --threads 1 >"$d/out" 2>"$d/err" || bad "train"
ckpt=$d/run/ckpt-00000002
want 0 '' "$retort" export "$ckpt" --out "$d/exported" --json
grep -q '"dtype":"F32".*"tokenizer":"[^"]' "$d/out" || bad "export --json: type and tokenizer"
same "$d/exported/tokenizer.json" "$student/tokenizer.json" "export of a checkpoint: the run's tokenizer"
want 0 'warning: .*BF16' "$retort" export "$d/run" --out "$d/none" --dtype f32 --dry-run
mkdir "$d/begun" "$d/alone"
cp -r "$d/run/config.json" "$ckpt" "$d/begun/"
want 0 '' "$retort" export "$d/begun/ckpt-00000002" --out "$d/exported-begun"
same "$d/exported-begun/tokenizer.json" "$student/tokenizer.json" "export of an unfinished run's checkpoint: the tokenizer it began with"
cp -r "$ckpt" "$d/alone/ckpt"
want 0 'warning: .*--tokenizer DIR' "$retort" export "$d/alone/ckpt" --out "$d/exported-alone"
damage() { printf '\377\376\375' | dd of="$1" bs=1 seek=200000 conv=notrunc 2>/dev/null; }
damage "$d/alone/ckpt/adam_m.safetensors"
want 0 '' "$retort" export "$d/alone/ckpt" --out "$d/exported-moments" # which needs no moments
damage "$d/alone/ckpt/model.safetensors"
want 3 "model.safetensors: damaged" "$retort" export "$d/alone/ckpt" --out "$d/none"
want 3 "model.safetensors: damaged" "$retort" eval --student "$d/alone/ckpt" --tokenizer "$student" --data "$d/short.jsonl"
want 3 "model.safetensors: damaged" "$retort" train --student "$d/alone/ckpt" --tokenizer "$student" --data "$d/short.jsonl" --out "$d/none" --steps 1
want 3 "found kind 'shards', expected a run" "$retort" export "$d/set" --out "$d/none"
[ -e "$d/none" ] && bad "a damaged checkpoint, or something else, was exported"

# ---- eval: planned, checked before anything is computed, printed whatever becomes of the record ----
head -n 3 examples/prompts/arithmetic_eval.jsonl >"$d/problems.jsonl"
evaluate() { # more ...
    "$retort" eval --student "$d/run" --data "$d/short.jsonl" --data "$d/problems.jsonl" --samples 2 --max-tokens 9 --device cpu "$@"
}
checks=$((checks + 1))
evaluate --dry-run >"$d/out" 2>"$d/err" || bad "eval --dry-run"
grep -q '^  to score  *4 sequences' "$d/out" && grep -q '^  samples  *6 (2 each), at most 54 new tokens' "$d/out" || bad "eval --dry-run: the plan"
evaluate --dry-run --json >"$d/out" 2>"$d/err" && grep -q '"most_new_tokens":54' "$d/out" || bad "eval --dry-run --json"
[ -e "$d/run/eval.jsonl" ] && bad "eval --dry-run recorded something"
want 1 'nowhere.jsonl: no such file' "$retort" eval --student "$d/run" --data "$d/short.jsonl" --data "$d/nowhere.jsonl"
[ -s "$d/out" ] || [ -e "$d/run/eval.jsonl" ] && bad "eval: the first set was answered before the second was looked for"
checks=$((checks + 2))
(ulimit -f 3 2>/dev/null; evaluate >"$d/out" 2>"$d/err") && bad "eval of a run that cannot be written: exit code 0"
grep -q 'could not be recorded.*--no-record' "$d/err" && [ ! -s "$d/out" ] || bad "eval of a run that cannot be written: said before it is computed"
(ulimit -f 3 2>/dev/null; evaluate --no-record >"$d/out" 2>"$d/err") && grep -q 'pass@1' "$d/out" || bad "eval --no-record"
: >"$d/run/eval"
checks=$((checks + 1))
evaluate >"$d/out" 2>"$d/err" && bad "eval whose record fails: exit code 0"
grep -q 'cross-entropy' "$d/out" && grep -q 'printed, but not recorded.*--no-record' "$d/err" || bad "eval whose record fails: the numbers"
rm "$d/run/eval"
checks=$((checks + 1))
evaluate --json >"$d/out" 2>"$d/err" && [ "$(wc -l <"$d/run/eval.jsonl")" = 2 ] && grep -q '"per_sequence":"eval/problems-2.jsonl"' "$d/out" || bad "eval --json"

# ---- outputs that cannot be written ----
: >"$d/file"
run_logits 1 'file' "$d/text.jsonl" "$d/file/set"
run_logits 1 '' "$d/text.jsonl" /proc/nowhere/set
mkdir "$d/foreign"
: >"$d/foreign/thesis.txt"
want 1 'foreign' "$retort" train --student "$student" --data "$d/short.jsonl" --out "$d/foreign" --steps 1 --max-length 64
[ "$(ls -A "$d/foreign")" = thesis.txt ] || bad "train wrote into somebody's directory"
want 1 'stdout.*No space left' sh -c "'$retort' cat '$d/set' >/dev/full"
want 1 'stdout.*No space left' sh -c "'$retort' inspect '$d/set' >/dev/full"
want 1 'stdout.*No space left' sh -c "'$retort' logits --help >/dev/full"
want 1 'stdout' sh -c "'$retort' cat '$d/set' >&-"
checks=$((checks + 1))
{ "$retort" cat "$d/set" 2>"$d/err"; echo $? >"$d/code"; } | head -n 1 >/dev/null
[ "$(cat "$d/code")" = 1 ] || [ "$(cat "$d/code")" = 0 ] || bad "cat into a closed pipe: exit code $(cat "$d/code")"

# A disk that fills up: what was published stays, and the same command goes on where it was and yields the same bytes.
checks=$((checks + 1))
(ulimit -f 3 2>/dev/null; logits "$d/text.jsonl" "$d/full" >/dev/null 2>"$d/err")
[ $? = 1 ] || bad "a full disk: exit code is not 1"
grep -qE 'too large|No space' "$d/err" || bad "a full disk: not said"
find "$d/full" -name '*.tmp' | grep -q . && bad "a full disk: a temporary file is left"
run_logits 0 '' "$d/text.jsonl" "$d/full"
for f in "$d"/set/rows-*.msgpack "$d/set/manifest.jsonl"; do
    same "$f" "$d/full/$(basename "$f")" "$(basename "$f") differs after a full disk"
done

# Too little memory is said, with the numbers.
want 5 'memory' "$retort" logits --teacher "$teacher" --data "$d/text.jsonl" --out "$d/never" --memory 1M --max-length 64 --overlong split

# ---- text ----
checks=$((checks + 1))
printf '{"text": " kopi daso"}\n{"text": ""}\n' >"$d/in"
"$retort" tokenize --tokenizer "$teacher" <"$d/in" >"$d/ids" 2>"$d/err" || bad "tokenize"
"$retort" tokenize --tokenizer "$teacher" --decode <"$d/ids" >"$d/back" 2>"$d/err" || bad "tokenize --decode"
grep -q '"text": *" kopi daso"' "$d/back" || bad "text -> ids -> text is another text"
checks=$((checks + 1))
echo '{"ids": [99999999]}' | "$retort" tokenize --tokenizer "$teacher" --decode >"$d/out" 2>"$d/err"
[ $? = 3 ] || bad "an id that does not exist: exit code is not 3"
checks=$((checks + 1))
echo 'no JSON' | "$retort" tokenize --tokenizer "$teacher" >"$d/out" 2>"$d/err"
[ $? = 3 ] || bad "a line that is no JSON: exit code is not 3"

echo "$checks checks, $failed failed"
[ "$failed" = 0 ]
