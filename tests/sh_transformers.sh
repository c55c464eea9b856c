#!/bin/sh
# The embedded teacher, and a student that retort trained and exported, in transformers: runs where PyTorch is found. PYTHON names it.
set -eu
retort=$1/retort
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "SKIP no python3"; exit 0; }
"$python" -c 'import torch, transformers' 2>/dev/null || { echo "SKIP PyTorch and transformers are not installed"; exit 0; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"$retort" train --student examples/tiny_student --data examples/prompts/almanac_eval.jsonl --out "$dir/run" --steps 3 --batch-tokens 512 --quiet
"$retort" export "$dir/run" --out "$dir/student" --quiet
"$python" tests/check_transformers.py --retort "$retort" --student "$dir/student"
