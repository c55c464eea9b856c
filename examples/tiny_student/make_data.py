"""Text that teaches a student how the tiny teacher's world is written, but none of what it knows about causes.

  python make_data.py > data.jsonl

Arithmetic traces are true. Diagnosis traces count their symptoms rightly, but the leading causes and the boxed one are drawn evenly: a
student of this text knows the form, and its answers are guesses.
"""
import json
import os
import random
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tiny_teacher"))
import world

LINES, SEED = 20000, 5
PROMPTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "prompts")


def reserved():
    """Prompts that students are trained and measured on: not in this text."""
    names = [f"{family}_{part}.jsonl" for family in ("diagnosis", "arithmetic") for part in ("train", "eval")]
    return {json.loads(line)["prompt"] for name in names for line in open(os.path.join(PROMPTS, name), encoding="utf-8")}


def without_knowledge(line, rng):
    thought, answer = line["completion"].split("\n</think>")
    counts, leading = thought.rsplit("\n", 1)
    drawn = iter(sorted(rng.sample(range(len(world.CAUSES)), 3)))
    leading = re.sub(r"\b(" + "|".join(world.CAUSES) + r")\b", lambda m: world.CAUSES[next(drawn)], leading)
    answer = re.sub(r"\\boxed\{\w+\}", lambda m: "\\boxed{%s}" % rng.choice(world.CAUSES), answer)
    return f"{counts}\n{leading}\n</think>{answer}"


def main():
    rng, lines = random.Random(SEED), []
    diagnosis, arithmetic = random.Random(f"student/diagnosis/{SEED}"), random.Random(f"student/arithmetic/{SEED}")
    taken = reserved()
    for _ in range(LINES):
        line = world.diagnosis(diagnosis)
        line["completion"] = without_knowledge(line, rng)
        lines += [{k: each[k] for k in ("prompt", "completion")} for each in (line, world.arithmetic(arithmetic)) if each["prompt"] not in taken]
    rng.shuffle(lines)
    for line in lines:
        print(json.dumps(line, ensure_ascii=False))


if __name__ == "__main__":
    main()
