"""Training batches, each made from (seed, step) alone, so that they do not depend on the number of workers."""
import multiprocessing
import os
import random

import numpy as np
from tokenizers import Tokenizer

import world
from make_tokenizer import EOS, SPECIAL, prompt_text

DIAGNOSIS, SHORT, LONG, ALMANAC = (128, 108), (128, 88), (128, 120), (56, 256)
SEGMENTS = (DIAGNOSIS, SHORT, LONG, ALMANAC)     # by tokens about 30 % diagnosis, 40 % arithmetic, 30 % almanac
PROMPT_WEIGHT = 0.1

LAWS = np.array(world.LAWS)
CUMULATIVE = LAWS.cumsum(1) / LAWS.sum(1)[:, None]
NEAR, FAR = np.array(world.CLASS_NEAR), np.array(world.CLASS_FAR)


class Encoder:
    def __init__(self, folder):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        self.words = [self.ids(" " + w)[0] for w in world.WORDS]
        self.causes = [self.ids("{" + c)[0] for c in world.CAUSES]

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def chat(self, line):
        """-> (ids, number of prompt ids)"""
        prompt = self.ids(prompt_text(line["prompt"]))
        return prompt + self.ids(line["completion"] + EOS), len(prompt)

    def before_answer(self, ids):
        """Index of the token that predicts the boxed cause."""
        return next(i for i, t in enumerate(ids) if t in self.causes) - 1


def almanac_rows(rng, rows, words):
    out = np.empty((rows, words), np.int64)
    out[:, :2] = rng.integers(len(world.WORDS), size=(rows, 2))
    for i in range(2, words):
        near = rng.random(rows) < world.NEAR_WEIGHT
        law = np.where(near, NEAR[out[:, i - 1]], FAR[out[:, i - 2]])
        out[:, i] = (CUMULATIVE[law] < rng.random((rows, 1))).sum(1).clip(0, len(world.WORDS) - 1)
    return out


def fill(texts, shape):
    """Rows of ids with the weight of predicting each next token."""
    ids, weight = np.full(shape, SPECIAL.index("<｜▁pad▁｜>")), np.zeros(shape, np.float32)
    for row, (text, prompt) in enumerate(texts):
        text = text[:shape[1]]
        ids[row, :len(text)] = text
        weight[row, :len(text) - 1] = 1
        weight[row, :prompt - 1] = PROMPT_WEIGHT
    return ids.ravel(), weight.ravel()


def arithmetic_part(encoder, rng):
    texts = sorted((encoder.chat(world.arithmetic(rng)) for _ in range(SHORT[0] + LONG[0])), key=lambda t: len(t[0]))
    return [fill(texts[:SHORT[0]], SHORT), fill(texts[SHORT[0]:], LONG)]


def batch(encoder, seed, step):
    rng = random.Random(f"{seed} {step}")
    lines = [world.diagnosis(rng) for _ in range(DIAGNOSIS[0])]
    texts = [encoder.chat(line) for line in lines]
    ids, weight = fill(texts, DIAGNOSIS)
    answer = np.array([row * DIAGNOSIS[1] + encoder.before_answer(text) for row, (text, _) in enumerate(texts)])
    weight[answer] = 0      # the loss is taken against the posterior there
    parts = [(ids, weight)] + arithmetic_part(encoder, rng)
    words = almanac_rows(np.random.default_rng(rng.getrandbits(64)), ALMANAC[0], ALMANAC[1] - 1)
    ids = np.concatenate((np.zeros((ALMANAC[0], 1), np.int64), np.array(encoder.words)[words]), 1)
    weight = np.zeros(ALMANAC, np.float32)
    weight[:, :2] = 1      # the rest is scored against the true law
    parts.append((ids.ravel(), weight.ravel()))
    return {
        "tokens": np.concatenate([p[0] for p in parts]).astype(np.int32),
        "weight": np.concatenate([p[1] for p in parts]),
        "answer": answer.astype(np.int32), "posterior": np.array([line["posterior"] for line in lines], np.float32),
        "words": words.astype(np.int32),
    }


def _work(make, folder, seed, first, stride, steps, queue):
    encoder = Encoder(folder)
    for step in range(first, steps, stride):
        queue.put(make(encoder, seed, step))


def stream(folder, seed, steps, workers, make=batch):
    context = multiprocessing.get_context("fork")
    queues = [context.Queue(4) for _ in range(workers)]
    for i, queue in enumerate(queues):
        context.Process(target=_work, args=(make, folder, seed, i, workers, steps, queue), daemon=True).start()
    for step in range(steps):
        yield queues[step % workers].get()
