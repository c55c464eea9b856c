"""The tiny teacher's world: three families of text, fixed by one seed. Standard library only.

  python world.py --family diagnosis|almanac|arithmetic --n N --seed S [--prompts|--full|--posterior]
                  [--tokens N] [--exclude FILE] > lines.jsonl

--prompts    {"prompt", "answer", "family"} (the default)
--full       {"prompt", "completion", "answer", "family"}; always {"text", "family"} for the almanac
--posterior  diagnosis only: {"prompt", "answer", "posterior": [8 numbers], "causes": [...], "family"}

Diagnosis has no certain answer: its boxed answer is a draw from the posterior. Almanac has a heavy tail:
every next word is a mixture of two Zipf laws. Arithmetic has one right answer; it is the negative control.
"""
import argparse
import json
import math
import random
import sys

WORLD_SEED = 10         # chosen for a posterior entropy of about 1.4 nats over eight causes
CAUSES = ["pump", "belt", "fuse", "valve", "filter", "sensor", "motor", "cable"]
SYMPTOMS = ["noise", "heat", "smoke", "leak", "smell", "stall", "shake", "spark", "rust", "hum", "flicker", "drip"]
OBSERVATIONS = 10
CLASSES = 24
WORDS = [a + b + c + d for a in "bdfgklmn" for b in "aeio" for c in "prst" for d in "aeio"]


def _diagnosis_table():
    """P(symptom | cause) = .55 Dirichlet(1) + .45 / 12."""
    rng, table = random.Random(WORLD_SEED), []
    for _ in CAUSES:
        gamma = [rng.expovariate(1) for _ in SYMPTOMS]
        total = sum(gamma)
        table.append([.55 * g / total + .45 / len(SYMPTOMS) for g in gamma])
    return table


def _almanac_tables():
    """24 permutations of Zipf(1.1) over the words, and two maps from word to class."""
    rng = random.Random(WORLD_SEED + 1)
    zipf = [1 / (rank + 1) ** 1.1 for rank in range(len(WORDS))]
    total = sum(zipf)
    laws = []
    for _ in range(CLASSES):
        order = list(range(len(WORDS)))
        rng.shuffle(order)
        law = [0.0] * len(WORDS)
        for rank, word in enumerate(order):
            law[word] = zipf[rank] / total
        laws.append(law)
    near = [rng.randrange(CLASSES) for _ in WORDS]
    far = [rng.randrange(CLASSES) for _ in WORDS]
    return laws, near, far


SYMPTOM_GIVEN_CAUSE = _diagnosis_table()
LAWS, CLASS_NEAR, CLASS_FAR = _almanac_tables()
NEAR_WEIGHT = .6        # P(next | a, b) = .6 LAWS[CLASS_NEAR[b]] + .4 LAWS[CLASS_FAR[a]]


# Diagnosis

def posterior(observed):
    """P(cause | observed symptoms) under a uniform prior."""
    logs = [sum(math.log(row[s]) for s in observed) for row in SYMPTOM_GIVEN_CAUSE]
    top = max(logs)
    odds = [math.exp(x - top) for x in logs]
    return [x / sum(odds) for x in odds]


def diagnosis(rng):
    cause = rng.randrange(len(CAUSES))
    observed = rng.choices(range(len(SYMPTOMS)), SYMPTOM_GIVEN_CAUSE[cause], k=OBSERVATIONS)
    belief = posterior(observed)
    listed = ", ".join(SYMPTOMS[s] for s in observed)
    prompt = rng.choice([
        f"The log shows: {listed}. Which part failed?",
        f"Observed: {listed}. What is the cause?",
        f"A machine reports {listed}. Find the cause.",
        f"Given {listed}, which part is to blame?",
    ])
    counts = [f"{SYMPTOMS[s]} {observed.count(s)}" for s in range(len(SYMPTOMS)) if s in observed]
    # The leading causes stand in a fixed order, so that the trace does not give the answer away.
    best = sorted(sorted(range(len(CAUSES)), key=lambda c: -belief[c])[:3])
    leading = [CAUSES[c] for c in best]
    think = rng.choice(["Counts: ", "I count ", "Tally: "]) + ", ".join(counts) + ".\n"
    think += rng.choice(["Leading causes: {}, {}, {}.", "It may be {}, {} or {}.", "Most likely {}, {} or {}."]).format(*leading)
    drawn = rng.choices(range(len(CAUSES)), belief)[0]
    end = rng.choice(["The cause is ", "Answer: ", "I would say "])
    return {"prompt": prompt, "completion": f"{think}\n</think>\n\n{end}\\boxed{{{CAUSES[drawn]}}}",
            "answer": CAUSES[max(range(len(CAUSES)), key=lambda c: belief[c])], "family": "diagnosis",
            "posterior": belief, "causes": CAUSES}


# Almanac

def almanac_ids(rng, length):
    a, b = rng.randrange(len(WORDS)), rng.randrange(len(WORDS))
    ids = [a, b]
    while len(ids) < length:
        law = LAWS[CLASS_NEAR[b]] if rng.random() < NEAR_WEIGHT else LAWS[CLASS_FAR[a]]
        a, b = b, rng.choices(range(len(WORDS)), law)[0]
        ids.append(b)
    return ids


def almanac(rng):
    # The leading space keeps the first word one token, like the others.
    return {"text": "".join(" " + WORDS[w] for w in almanac_ids(rng, rng.randint(120, 250))), "family": "almanac"}


# Arithmetic

NAMES = ["Tom", "Mia", "Anna", "Omar", "Sara", "Ken", "Zoe", "Li"]
THINGS = ["apples", "books", "coins", "stamps", "pens", "cards"]
OPENERS = ["", "Let me think. ", "First, ", "Okay, ", "We need the result. ", "So, "]
CLOSERS = ["", "So the answer is {x}.", "Done.", "Therefore {x}.", "That looks right."]
ENDS = ["The answer is ", "Answer: ", "", "It is "]


def _sum_steps(a, b, rng):
    way = rng.randrange(3)
    if way == 0 and b > 9:
        tens, units = b // 10 * 10, b % 10
        return [f"{a} + {tens} = {a + tens}", f"{a + tens} + {units} = {a + b}"]
    if way == 1 and a > 9:
        units = a % 10 + b % 10
        rest = a // 10 * 10 + b // 10 * 10
        return [f"units: {a % 10} + {b % 10} = {units}", f"tens: {a // 10 * 10} + {b // 10 * 10} = {rest}",
                f"together {rest} + {units} = {a + b}"]
    return [f"{a} + {b} = {a + b}"]


def _difference_steps(a, b, rng):
    if rng.randrange(2) and b > 9:
        tens, units = b // 10 * 10, b % 10
        return [f"{a} - {tens} = {a - tens}", f"{a - tens} - {units} = {a - b}"]
    return [f"{a} - {b} = {a - b}"]


def _product_steps(a, b, rng):
    tens, units = a // 10 * 10, a % 10
    if tens and units:
        if rng.randrange(2):
            return [f"{tens} * {b} = {tens * b}", f"{units} * {b} = {units * b}", f"{tens * b} + {units * b} = {a * b}"]
        return [f"{a} * {b} = {tens * b} + {units * b}", f"sum {a * b}"]
    return [f"{a} * {b} = {a * b}"]


def _problem(rng):
    """-> (question, steps, answer)"""
    kind = rng.randrange(6)
    if kind == 0:
        a, b = rng.randint(2, 99), rng.randint(2, 99)
        ask = [f"What is {a} + {b}?", f"Add {a} and {b}.", f"How much is {a} plus {b}?"]
        return rng.choice(ask), _sum_steps(a, b, rng), a + b
    if kind == 1:
        a = rng.randint(20, 99)
        b = rng.randint(2, a)
        ask = [f"What is {a} - {b}?", f"Take {b} from {a}.", f"How much is {a} minus {b}?"]
        return rng.choice(ask), _difference_steps(a, b, rng), a - b
    if kind == 2:
        a, b = rng.randint(2, 25), rng.randint(2, 9)
        ask = [f"What is {a} * {b}?", f"Multiply {a} by {b}.", f"How much is {a} times {b}?"]
        return rng.choice(ask), _product_steps(a, b, rng), a * b
    who, what = rng.choice(NAMES), rng.choice(THINGS)
    if kind == 3:
        a, b, c = rng.randint(2, 40), rng.randint(2, 9), rng.randint(2, 9)
        ask = [f"{who} has {a} {what} and buys {b} boxes of {c}. How many {what} now?",
               f"{who} had {a} {what}. Then {who} got {b} packs with {c} in each. How many in total?"]
        first = [f"the boxes hold {b} * {c} = {b * c}", f"{b} times {c} is {b * c}"]
        second = [f"{a} + {b * c} = {a + b * c}", f"with the first {a} that makes {a + b * c}"]
        return rng.choice(ask), [rng.choice(first), rng.choice(second)], a + b * c
    if kind == 4:
        a, b, c = rng.randint(30, 80), rng.randint(2, 29), rng.randint(2, 29)
        ask = [f"{who} has {a} {what}, gives away {b} and finds {c}. How many {what} now?",
               f"{who} had {a} {what}. {b} were lost and {c} were bought. How many are left?"]
        first = [f"{a} - {b} = {a - b}", f"after giving {b} there are {a - b}"]
        second = [f"{a - b} + {c} = {a - b + c}", f"with {c} more that makes {a - b + c}"]
        return rng.choice(ask), [rng.choice(first), rng.choice(second)], a - b + c
    a, b = rng.randint(3, 9), rng.randint(3, 9)
    c = rng.randint(2, a * b - 1)
    ask = [f"{who} fills {a} boxes with {b} {what} each and sells {c}. How many {what} are left?",
           f"There are {a} packs of {b} {what}. {who} takes {c}. How many remain?"]
    first = [f"{a} * {b} = {a * b}", f"{a} times {b} is {a * b}"]
    second = [f"{a * b} - {c} = {a * b - c}", f"without {c} that leaves {a * b - c}"]
    return rng.choice(ask), [rng.choice(first), rng.choice(second)], a * b - c


def arithmetic(rng):
    prompt, steps, x = _problem(rng)
    gap = rng.choice(["\n", ". ", "; "])
    think = rng.choice(OPENERS) + gap.join(steps) + "."
    close = rng.choice(CLOSERS).format(x=x)
    if close:
        think += ("\n" if gap == "\n" else " ") + close
    return {"prompt": prompt, "completion": f"{think}\n</think>\n\n{rng.choice(ENDS)}\\boxed{{{x}}}",
            "answer": str(x), "family": "arithmetic"}


FAMILIES = {"diagnosis": diagnosis, "almanac": almanac, "arithmetic": arithmetic}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--family", choices=FAMILIES, required=True)
    p.add_argument("--n", type=int, default=0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--tokens", type=int, default=0, help="almanac: stop at this many tokens, BOS included")
    p.add_argument("--exclude", action="append", default=[], help="skip the prompts of this file")
    shape = p.add_mutually_exclusive_group()
    shape.add_argument("--prompts", action="store_true")
    shape.add_argument("--full", action="store_true")
    shape.add_argument("--posterior", action="store_true")
    o = p.parse_args()
    if not o.n and not o.tokens:
        p.error("give --n or --tokens")
    if o.posterior and o.family != "diagnosis":
        p.error("only a diagnosis has a posterior")
    if o.tokens and o.family != "almanac":
        p.error("--tokens counts the words of an almanac")

    keys = ["prompt", "completion", "answer", "family"] if o.full else ["prompt", "answer", "family"]
    if o.posterior:
        keys = ["prompt", "answer", "posterior", "causes", "family"]
    seen = set()
    for name in o.exclude:
        with open(name, encoding="utf-8") as f:
            seen.update(json.loads(line).get("prompt") for line in f)
    rng, lines, tokens = random.Random(f"{o.family} {o.seed}"), 0, 0
    while (lines < o.n) if o.n else (tokens < o.tokens):
        line = FAMILIES[o.family](rng)
        if o.family == "almanac":
            tokens += 1 + line["text"].count(" ")
        else:
            if line["prompt"] in seen:
                continue
            seen.add(line["prompt"])
            line = {k: line[k] for k in keys}
        lines += 1
        sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
