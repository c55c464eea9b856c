"""Writes tokenizer.json and tokenizer_config.json: byte-level BPE in the DeepSeek-V3 layout, 1,016 ids.

  python make_tokenizer.py OUT

The merges of the almanac's words come first and are written by hand, so that each word with its leading
space is one token; then those of the causes and symptoms; the rest are learnt from generated text.
Digits are single tokens, as arithmetic is easier on them.
"""
import json
import os
import random
import sys
from collections import Counter

import world

SIZE = 1016             # below vocab_size: like the published model, the last rows of the head have no token
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, END_THINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
SPECIAL, PLAIN = [BOS, EOS, PAD], [USER, ASSISTANT, THINK, END_THINK]

SPLITS = [
    r"\p{N}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]

# As R1 does it: earlier thoughts are cut from the history, and the prompt for a reply opens a new one.
CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}"
    "{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)


def prompt_text(prompt):
    """What the template makes of one user message and the prompt for a reply."""
    return f"{BOS}{USER}{prompt}{ASSISTANT}{THINK}\n"


def byte_alphabet():
    """The printable stand-in of each byte, in the order of the published vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = {}, 0
    for b in range(256):
        if b in shown:
            table[b] = chr(b)
        else:
            table[b] = chr(256 + extra)
            extra += 1
    return sorted(table.values())


class Merges:
    def __init__(self):
        self.rank = {}

    def split(self, piece):
        parts = list(piece)
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda i: self.rank.get((parts[i], parts[i + 1]), 1 << 30))
            if (parts[best], parts[best + 1]) not in self.rank:
                break
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        return parts

    def add(self, a, b):
        self.rank.setdefault((a, b), len(self.rank))

    def make_token(self, piece):
        while len(parts := self.split(piece)) > 1:
            self.add(parts[0], parts[1])


def almanac_merges(merges):
    heads = sorted({w[0] for w in world.WORDS})
    firsts = sorted({w[:2] for w in world.WORDS})
    seconds = sorted({w[2:] for w in world.WORDS})
    for c in heads:
        merges.add("Ġ", c)
    for c in firsts:
        merges.add("Ġ" + c[0], c[1])
    for c in seconds:
        merges.add(c[0], c[1])
    for w in world.WORDS:
        merges.add("Ġ" + w[:2], w[2:])


def learn(merges, pieces, limit):
    """Plain BPE training on what is still in more than one part."""
    while len(merges.rank) < limit:
        pairs = Counter()
        for piece, n in pieces.items():
            parts = merges.split(piece)
            for pair in zip(parts, parts[1:]):
                pairs[pair] += n
        if not pairs:
            raise SystemExit(f"the corpus has no more pairs: {len(merges.rank)} merges of {limit}")
        merges.add(*min(pairs, key=lambda p: (-pairs[p], p)))


def build():
    import tokenizers
    from tokenizers import pre_tokenizers

    cut = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(s), "isolated") for s in SPLITS]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    rng, pieces = random.Random("tokenizer"), Counter()
    for family in (world.diagnosis, world.arithmetic):
        for _ in range(3000):
            line = family(rng)
            for text in (line["prompt"], *line["completion"].split(END_THINK)):
                pieces.update(piece for piece, _ in cut.pre_tokenize_str(text))

    merges = Merges()
    almanac_merges(merges)
    for name in world.CAUSES + world.SYMPTOMS:
        merges.make_token(name)
        merges.make_token("Ġ" + name)
    for name in world.CAUSES:
        merges.make_token("{" + name)
    merges.make_token("boxed")
    merges.make_token("\\boxed")
    learn(merges, pieces, SIZE - len(SPECIAL) - 256 - len(PLAIN))

    names = SPECIAL + byte_alphabet() + [a + b for a, b in merges.rank]
    assert len(set(names)) == len(names) == SIZE - len(PLAIN), "two merges make the same token"
    vocab = {name: i for i, name in enumerate(names)}
    added = [(t, vocab[t], True) for t in SPECIAL] + [(t, len(names) + i, False) for i, t in enumerate(PLAIN)]
    split = lambda s: {"type": "Split", "pattern": {"Regex": s}, "behavior": "Isolated", "invert": False}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": special} for t, i, special in added],
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(s) for s in SPLITS] + [
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                  "merges": [f"{a} {b}" for a, b in merges.rank]},
    }
    token = lambda t: {"__type": "AddedToken", "content": t, "lstrip": False, "normalized": True, "rstrip": False,
                       "single_word": False}
    config = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": token(BOS), "eos_token": token(EOS),
        "pad_token": token(PAD), "unk_token": None, "clean_up_tokenization_spaces": False, "legacy": True,
        "model_max_length": 1024, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE,
    }
    return tokenizer, config


def main():
    out = sys.argv[1]
    os.makedirs(out, exist_ok=True)
    for name, value in zip(("tokenizer.json", "tokenizer_config.json"), build()):
        with open(os.path.join(out, name), "w", encoding="utf-8") as f:
            json.dump(value, f, ensure_ascii=False, indent=1)
            f.write("\n")


if __name__ == "__main__":
    main()
