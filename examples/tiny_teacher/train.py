"""Trains the tiny teacher and writes its checkpoint.

  python train.py --out DIR [--steps N] [--seed S] [--workers N] [--device cuda|cpu]

DIR must hold the tokenizer. The loss is the next token's plus 0.2 times the MTP layer's; experts are balanced
by the auxiliary-loss-free update of the bias; the weights are rounded to their stored form in every forward pass.
"""
import argparse
import math
import os
import time

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # cuBLAS repeats itself only with this

import torch
import torch.nn.functional as F

import batches
import checkpoint
import world
from model import CONFIG, Model

MTP_WEIGHT, ANSWER_WEIGHT, BIAS_SPEED = 0.2, 8.0, 1e-3


def losses(logits, data, laws, ahead):
    """The loss of rows that predict the token `ahead` places on: its sum, and two means to report.

    Where the world's law is known (the boxed cause, an almanac's next word) the loss is taken against the whole
    law: the expected gradient is that of sampled text, without the sampling noise."""
    z = logits.float()
    lse = z.logsumexp(-1)
    text = (F.cross_entropy(z, data["tokens"].roll(-ahead), reduction="none") * data["weight"].roll(1 - ahead)).sum()

    at = data["answer"] + 1 - ahead
    answer = (lse[at] - (data["posterior"] * z[at][:, laws["causes"]]).sum(-1)).sum()

    rows, length = batches.ALMANAC
    span = slice(3 - ahead, length + 1 - ahead)       # from the first word that has two before it
    zw = z[-rows * length:].view(rows, length, -1)[:, span, laws["first_word"]:laws["first_word"] + len(world.WORDS)]
    b, a = data["words"][:, 1:], data["words"][:, :-1]
    law = world.NEAR_WEIGHT * laws["law"][laws["near"][b]] + (1 - world.NEAR_WEIGHT) * laws["law"][laws["far"][a]]
    almanac = (lse[-rows * length:].view(rows, length)[:, span] - (law * zw).sum(-1)).sum()
    return text + ANSWER_WEIGHT * answer + almanac, answer.detach() / at.numel(), almanac.detach() / b.numel()


def world_laws(encoder, device):
    assert encoder.words == list(range(encoder.words[0], encoder.words[0] + len(world.WORDS)))
    return {"law": torch.tensor(world.LAWS, device=device), "near": torch.tensor(world.CLASS_NEAR, device=device),
            "far": torch.tensor(world.CLASS_FAR, device=device), "causes": torch.tensor(encoder.causes, device=device),
            "first_word": encoder.words[0]}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True)
    p.add_argument("--steps", type=int, default=4500)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    p.add_argument("--device", default="cuda")
    o = p.parse_args()

    start = time.time()
    stream = batches.stream(o.out, o.seed, o.steps, o.workers)      # before CUDA: the workers are forked
    first = next(stream)
    torch.manual_seed(o.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.enable_cudnn_sdp(False)         # its backward pass does not repeat itself
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    model = Model(CONFIG)
    print(f"{sum(w.numel() for w in model.parameters()) / 1e6:.2f}M parameters, {len(first['tokens'])} tokens a step", flush=True)
    model.to(o.device)
    laws = world_laws(batches.Encoder(o.out), o.device)

    def objective(data):
        logits, mtp, loads = model(data["tokens"], batches.SEGMENTS)
        real = (data["tokens"] != 2)[:, None]
        main_loss, answer, almanac = losses(logits, data, laws, 1)
        mtp_loss, _, _ = losses(mtp, data, laws, 2)
        count = data["weight"].sum() + data["words"].numel()
        return (main_loss + MTP_WEIGHT * mtp_loss) / count, answer, almanac, torch.stack([(m & real).sum(0) for m in loads])

    step_loss = torch.compile(objective) if o.device == "cuda" else objective
    matrices = [w for w in model.parameters() if w.ndim == 2]
    vectors = [w for w in model.parameters() if w.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=o.lr, betas=(0.9, 0.95), fused=o.device == "cuda")
    biases = [getattr(model, f"bias_{i}") for i in range(CONFIG["first_k_dense_replace"], CONFIG["num_hidden_layers"] + 1)]
    parameters = list(model.parameters())
    for step in range(o.steps):
        raw = first if step == 0 else next(stream)
        data = {k: torch.from_numpy(v).to(o.device, non_blocking=True) for k, v in raw.items()}
        for k in ("tokens", "answer", "words"):
            data[k] = data[k].long()
        done = step / o.steps
        rate = o.lr * min(1, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, answer, almanac, loads = step_loss(data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if done < 0.9:      # a settled router for the last tenth
            mean = loads.float().mean(1, keepdim=True)
            for bias, sign in zip(biases, torch.sign(mean - loads.float())):
                bias += BIAS_SPEED * sign
        if step % 250 == 0 or step == o.steps - 1:
            share = (loads.float() / loads.sum(1, keepdim=True)).amax(1).tolist()
            print(f"{step:6d} loss {loss.item():.4f} answer {answer.item():.4f} almanac {almanac.item():.4f} "
                  f"busiest expert {' '.join(f'{s:.2f}' for s in share)}  {time.time() - start:.0f} s", flush=True)
    checkpoint.save(model, o.out)
    print(f"trained in {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
