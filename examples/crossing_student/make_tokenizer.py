"""Writes tokenizer.json and tokenizer_config.json of another kind than the teacher's: byte-level BPE in the Qwen3 layout, 637 ids.

  python make_tokenizer.py OUT

Everything that differs between the published teachers and students differs here, too: the pre-tokenizer's pattern, NFC, the order of the
byte tokens, no BOS, ChatML roles, EOS and the think tags behind the vocabulary. All merges are learnt, from text of the teacher's world, and
they are fewer: an almanac word is two tokens or three, a cause one or several, and some tokens reach across two of the teacher's.
"""
import json
import os
import random
import sys
from collections import Counter

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "tiny_teacher"))
import make_tokenizer as teacher
import world

MERGES = 376
ADDED = [("<|endoftext|>", True), ("<|im_start|>", True), ("<|im_end|>", True), ("<think>", False), ("</think>", False)]
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# As the thinking-only Qwen3 does it: earlier thoughts are cut from the history, and the prompt for a reply opens a new one.
CHAT_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last_query_index = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}
"""


def pieces():
    """Pre-tokenized text of all three families, with counts."""
    import tokenizers
    from tokenizers import pre_tokenizers

    cut = pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    rng, found = random.Random("crossing"), Counter()
    for family, lines in ((world.diagnosis, 1000), (world.arithmetic, 3000), (world.almanac, 300)):
        for _ in range(lines):
            line = family(rng)
            texts = [line["text"]] if "text" in line else [line["prompt"], *line["completion"].split("</think>")]
            for text in texts:
                found.update(piece for piece, _ in cut.pre_tokenize_str(text))
    return found


def build():
    merges = teacher.Merges()
    teacher.learn(merges, pieces(), MERGES)
    alphabet = [c for b in (range(33, 127), range(161, 173), range(174, 256)) for c in map(chr, b)]
    alphabet += [c for c in teacher.byte_alphabet() if c not in alphabet]  # the order of GPT-2's vocabulary
    names = alphabet + [a + b for a, b in merges.rank]
    assert len(set(names)) == len(names) == 256 + MERGES, "two merges make the same token"
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": len(names) + i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": special} for i, (t, special) in enumerate(ADDED)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {name: i for i, name in enumerate(names)}, "merges": [[a, b] for a, b in merges.rank]},
    }
    config = {
        "add_bos_token": False, "add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "unk_token": None, "clean_up_tokenization_spaces": False, "errors": "replace", "split_special_tokens": False,
        "model_max_length": 1024, "tokenizer_class": "Qwen2Tokenizer", "chat_template": CHAT_TEMPLATE,
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
