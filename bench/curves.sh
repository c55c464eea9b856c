#!/bin/sh
# The same training on several devices: SmolLM2-135M's geometry, 1,000 steps of 64 tokens from one random student, on the almanac of examples/prompts in
# the tokens of examples/tiny_student. BF16 with float32 sums (cuda) beside float32 (cpu): the loss curves have to lie on each other.
#
#     sh bench/curves.sh RETORT OUT [DEVICE ...]        DEVICE: cpu, cuda, ref; default: both of cpu and cuda
#     STEPS=1000 LR=3e-4 THREADS=0 SAVE=250
#
# OUT/DEVICE is a run: one that is finished (here or elsewhere) is not made again, one that was stopped goes on. Where there are two or more, each is held
# against the first: initial student and order of data by their hashes, losses step by step. Fails where a hash differs, or smoothed losses by more than
# 2 % in the mean.
set -eu
retort=$1
out=$2
shift 2
[ $# -gt 0 ] || set -- cpu cuda
here=$(dirname "$0")/../examples
mkdir -p "$out"
if [ ! -f "$out/data.jsonl" ]; then
    "$retort" tokenize --tokenizer "$here/tiny_student" <"$here/prompts/almanac_train.jsonl" |
        sed 's/.*"ids":\[//; s/\].*//' | tr ',' '\n' |
        awk '{ line = line (n > 0 ? "," : "") $1; if (++n == 64) { print "{\"input_ids\":[" line "]}"; n = 0; line = "" } }' >"$out/data.jsonl"
    cat >"$out/config.json" <<'EOF'
{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
 "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "hidden_act": "silu", "max_position_embeddings": 8192,
 "rms_norm_eps": 1e-05, "rope_theta": 100000.0, "tie_word_embeddings": true, "initializer_range": 0.02, "torch_dtype": "bfloat16", "bos_token_id": 0,
 "eos_token_id": 1}
EOF
fi
for device in "$@"; do
    if grep -q '"finished": *true' "$out/$device/run.json" 2>/dev/null; then
        echo "$out/$device: finished already"
        continue
    fi
    "$retort" train --device "$device" --threads "${THREADS:-0}" --init-config "$out/config.json" --tokenizer "$here/tiny_student" --data "$out/data.jsonl" \
        --out "$out/$device" --w-ce 1 --w-kl 0 --steps "${STEPS:-1000}" --batch-tokens 64 --lr "${LR:-3e-4}" --seed 1 --save-every "${SAVE:-250}" --quiet
done

# step and loss of a run
losses() {
    sed -n 's/^{"step": *\([0-9]*\), *"loss": *\([-+0-9.e]*\),.*/\1 \2/p' "$1/metrics.jsonl"
}
# text of a member
member() {
    sed -n "s/.*\"$2\": *\"\{0,1\}\([^\",}]*\).*/\1/p" "$1/run.json" | tail -1
}
hash_of() {
    awk -v key="$2" '{ all = all $0 } END { if (match(all, "\"" key "\": *\"[0-9a-f]*\"")) { s = substr(all, RSTART, RLENGTH); sub(/.*: *"/, "", s); sub(/"/, "", s); print s } }' "$1/run.json"
}
first=$1
failed=0
for device in "$@"; do
    seconds=$(member "$out/$device" seconds)
    printf '%-6s %s, %s s of training\n' "$device" "$(wc -l <"$out/$device/metrics.jsonl") steps" "$seconds"
    [ "$device" != "$first" ] || continue
    for key in order_sha256 sha256; do
        a=$(hash_of "$out/$first" $key)
        b=$(hash_of "$out/$device" $key)
        what=$([ $key = sha256 ] && echo 'initial student' || echo 'order of data')
        if [ -n "$a" ] && [ "$a" = "$b" ]; then
            echo "$what: the same ($(echo "$a" | cut -c1-12))"
        else
            echo "$what: $first has $a, $device has $b"
            failed=1
        fi
    done
    losses "$out/$first" >"$out/first.txt"
    losses "$out/$device" >"$out/other.txt"
    # smoothed: mean of the last 50 steps
    paste -d ' ' "$out/first.txt" "$out/other.txt" | awk -v x="$first" -v y="$device" '
        function abs(v) { return v < 0 ? -v : v }
        BEGIN { worst = 0; at = 0 }
        $1 != $3 { print "steps " $1 " and " $3 " side by side"; exit 1 }
        {
            d = $2 - $4; n++; sum += abs(d); bias += d
            if (abs(d) > worst) { worst = abs(d); at = $1; pair = $2 " and " $4 }
            a[n] = $2; b[n] = $4; sa += $2; sb += $4
            if (n > 50) { sa -= a[n - 50]; sb -= b[n - 50] }
            if (n >= 50) { smooth += abs(sa - sb) / 50; rel += abs(sa - sb) / sa; m++ }
            ta += $2; tb += $4
            if (n % 100 == 0) { printf "  steps %5d to %5d   %s %.4f   %s %.4f   difference %+.4f\n", n - 99, n, x, ta / 100, y, tb / 100, (tb - ta) / 100; ta = tb = 0 }
        }
        END {
            if (m == 0) { print "fewer than 50 steps"; exit 1 }
            printf "losses of %d steps: mean absolute difference %.4f a step (mean %+.5f; worst %.4f at step %d: %s), %.4f smoothed over 50 (%.2f %%)\n", n, sum / n, -bias / n, worst, at, pair, smooth / m, 100 * rel / m
            exit rel / m > 0.02
        }' || failed=1
done
exit $failed
