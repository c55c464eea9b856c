"""Measures the exported checkpoint (dequantised, float32) against its world's truth.

  python evaluate.py DIR [--n N] [--device cuda|cpu] [--w8a8]

--w8a8 also rounds activations to FP8 in runs of 128, as the published model runs.
"""
import argparse
import random
import re
import time

import numpy as np
import torch
import torch.nn.functional as F

import batches
import checkpoint
import world
from make_tokenizer import prompt_text

SEED = "evaluation"
LIMIT = 128


@torch.no_grad()
def forward(model, rows, mtp=False, chunk=256):
    """rows [B, L] -> logits [B, L, V] (and the MTP layer's)."""
    out = [model(r.flatten(), ((r.shape[0], r.shape[1]),), mtp) for r in rows.split(chunk)]
    z = torch.cat([o[0].view(-1, rows.shape[1], o[0].shape[-1]) for o in out])
    return (z, torch.cat([o[1].view(-1, rows.shape[1], o[1].shape[-1]) for o in out])) if mtp else z


@torch.no_grad()
def generate(model, encoder, prompts, temperature, device, chunk=250):
    """Lists of new ids. No cache: at this size whole rows are run again for each token."""
    rng, results = torch.Generator(device).manual_seed(1), []
    for at in range(0, len(prompts), chunk):
        part = prompts[at:at + chunk]
        rows = torch.full((len(part), max(map(len, part)) + LIMIT), 2, device=device)
        for i, ids in enumerate(part):
            rows[i, :len(ids)] = torch.tensor(ids, device=device)
        length = torch.tensor([len(ids) for ids in part], device=device)
        begin, index = length.clone(), torch.arange(len(part), device=device)
        done = torch.zeros(len(part), dtype=torch.bool, device=device)
        for _ in range(LIMIT):
            z = forward(model, rows[:, :int(length.max())])[index, length - 1].float()
            z[:, encoder.tokenizer.get_vocab_size():] = -torch.inf
            new = torch.multinomial(F.softmax(z / temperature, -1), 1, generator=rng)[:, 0] if temperature else z.argmax(-1)
            rows[index[~done], length[~done]] = new[~done]
            length = length + (~done).long()
            done |= new == 1
            if done.all():
                break
        results += [row[b:n].tolist() for row, b, n in zip(rows, begin.tolist(), length.tolist())]
    return results


def boxed(text):
    found = re.findall(r"\\boxed\{([^}]*)\}", text)
    return found[-1] if found else None


def padded(texts, device):
    rows = torch.full((len(texts), max(map(len, texts))), 2, device=device)
    for i, ids in enumerate(texts):
        rows[i, :len(ids)] = torch.tensor(ids, device=device)
    return rows


def kl_at_answer(model, encoder, texts, lines, device):
    """KL(truth || teacher) over the whole vocabulary where the boxed cause is decided, and how often the modes agree."""
    if not texts:
        return float("nan"), float("nan")
    z = forward(model, padded(texts, device))
    at = torch.tensor([encoder.before_answer(t) for t in texts], device=device)
    logp = z[torch.arange(len(texts), device=device), at].float().log_softmax(-1)[:, encoder.causes]
    truth = torch.tensor([line["posterior"] for line in lines], device=device)
    kl = (truth * (truth.clamp(min=1e-30).log() - logp)).sum(-1)
    return kl.mean().item(), (logp.argmax(-1) == truth.argmax(-1)).float().mean().item()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder")
    p.add_argument("--n", type=int, default=1000)
    p.add_argument("--device", default="cuda")
    p.add_argument("--w8a8", action="store_true")
    o = p.parse_args()
    start = time.time()
    encoder = batches.Encoder(o.folder)
    model = checkpoint.load(o.folder, dtype=torch.float32, activations=o.w8a8).to(o.device)
    decode = lambda ids: encoder.tokenizer.decode(ids, skip_special_tokens=False)
    say = lambda name, value: print(f"{name:58s} {value}", flush=True)

    lines = [world.diagnosis(random.Random(f"{SEED} {i}")) for i in range(o.n)]
    texts = [encoder.chat(line)[0] for line in lines]
    prompts = [encoder.ids(prompt_text(line["prompt"])) for line in lines]
    entropy = np.mean([-sum(x * np.log(x) for x in line["posterior"]) for line in lines])
    say("diagnosis: posterior entropy, nats", f"{entropy:.4f}")
    say("diagnosis: mean of the greatest posterior", f"{np.mean([max(line['posterior']) for line in lines]):.4f}")
    kl, top = kl_at_answer(model, encoder, texts, lines, o.device)
    say("diagnosis: KL(truth || teacher) at the answer, true traces", f"{kl:.5f}")
    say("diagnosis: most probable cause named, true traces", f"{top:.4f}")
    for temperature in (0, 1):
        replies = generate(model, encoder, prompts, temperature, o.device)
        right = np.mean([boxed(decode(r)) == line["answer"] for r, line in zip(replies, lines)])
        say(f"diagnosis: answer right, own trace, T={temperature}", f"{right:.4f}")
        whole = [(q + r, line) for q, r, line in zip(prompts, replies, lines) if any(t in encoder.causes for t in r)]
        kl, _ = kl_at_answer(model, encoder, [w[0] for w in whole], [w[1] for w in whole], o.device)
        say(f"diagnosis: KL at the answer, own trace, T={temperature}", f"{kl:.5f} ({len(whole)} of {o.n} answered)")

    lines = [world.arithmetic(random.Random(f"{SEED} {i}")) for i in range(o.n)]
    prompts = [encoder.ids(prompt_text(line["prompt"])) for line in lines]
    for temperature in (0, 0.6, 1):
        replies = generate(model, encoder, prompts, temperature, o.device)
        right = np.mean([boxed(decode(r)) == line["answer"] for r, line in zip(replies, lines)])
        say(f"arithmetic: answer right, T={temperature}", f"{right:.4f}")
    texts = [encoder.chat(line) for line in lines]
    rows = padded([t for t, _ in texts], o.device)
    z, ahead = forward(model, rows, mtp=True)
    ce, hits, tries = [], 0, 0
    for i, (ids, begin) in enumerate(texts):
        target = torch.tensor(ids[begin:], device=o.device)
        ce.append(F.cross_entropy(z[i, begin - 1:len(ids) - 1].float(), target, reduction="sum").item() / len(target))
        main_choice, draft = z[i, begin:len(ids) - 1].argmax(-1), ahead[i, begin - 1:len(ids) - 2].argmax(-1)
        hits, tries = hits + (main_choice == draft).sum().item(), tries + len(draft)
    say("arithmetic: cross-entropy of true completions, nats a token", f"{np.mean(ce):.4f}")
    say("arithmetic: MTP draft equals the main model's greedy token", f"{hits / tries:.4f}")

    words = batches.almanac_rows(np.random.default_rng(2), max(16, o.n // 10), 255)
    rows = torch.tensor(np.concatenate((np.zeros((len(words), 1), np.int64), np.array(encoder.words)[words]), 1), device=o.device)
    z, ahead = forward(model, rows, mtp=True)
    truth = world.NEAR_WEIGHT * batches.LAWS[batches.NEAR[words[:, 1:]]] + (1 - world.NEAR_WEIGHT) * batches.LAWS[batches.FAR[words[:, :-1]]]
    truth = torch.tensor(truth, device=o.device, dtype=torch.float32)
    say("almanac: entropy of the true law, nats", f"{-(truth * truth.log()).sum(-1).mean().item():.4f}")
    for name, logits in (("teacher", z[:, 2:]), ("MTP layer", ahead[:, 1:-1])):
        logp = logits.float().log_softmax(-1)[..., encoder.words]
        say(f"almanac: KL(truth || {name})", f"{(truth * (truth.log() - logp)).sum(-1).mean().item():.5f}")
    print(f"measured in {time.time() - start:.0f} s on {o.device}{', w8a8' if o.w8a8 else ''}", flush=True)


if __name__ == "__main__":
    main()
