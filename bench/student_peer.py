#!/usr/bin/env python3
"""The peer of bench_student_train: the same geometry trained by transformers and torch.compile, random weights, on the same card.

    python3 bench/student_peer.py --config config.json [--length 2048] [--sequences 8] [--top-k 64] [--loss ce,kd] [--params f32|bf16] [--compile layers|whole]

The usual recipe: float32 parameters under BF16 autocast (or pure BF16 with --params bf16, which loses small updates), scaled_dot_product_attention, fused
AdamW, gradient clipping at 1, one optimiser step a batch. KD is half cross-entropy and half T^2 KL to the stored teacher logits and one bucket for all other
ids at T = 2, as one writes it with log_softmax over whole logits; where that does not fit, over chunks of rows that are computed again in backward.
torch.compile takes a decoder layer, once for all, and the loss of rows; or, with --compile whole, everything in one, which takes minutes.
A line a loss: tokens a second (median step) and peak memory. Needs PyTorch with CUDA, and transformers.
"""
import argparse
import functools
import json
import statistics
import time

import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

T = 2.0


def row_loss(hidden, head, labels, top_ids, top_logp):
    """Sums over rows of CE and of T^2 KL; hidden [n, H]."""
    logits = F.linear(hidden, head).float()
    ce = F.cross_entropy(logits, labels, reduction="sum")
    if top_ids is None:
        return ce, ce.new_zeros(())
    logq = F.log_softmax(logits / T, dim=-1).gather(-1, top_ids)
    p = top_logp.exp()
    rest_p = (1 - p.sum(-1)).clamp_min(1e-7)
    rest_q = (1 - logq.exp().sum(-1)).clamp_min(1e-12)
    kl = (p * (top_logp - logq)).sum(-1) + rest_p * (rest_p / rest_q).log()
    return ce, T * T * kl.sum()


def loss_of(row_loss, model, ids, top_ids, top_logp, chunk):
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state.flatten(0, 1)
    labels = ids[:, 1:].flatten()
    ce = kl = 0.0
    for at in range(0, labels.numel(), chunk or labels.numel()):
        part = slice(at, at + (chunk or labels.numel()))
        teacher = (None, None) if top_ids is None else (top_ids[part], top_logp[part])
        args = (hidden[part], model.lm_head.weight, labels[part], *teacher)
        c, k = checkpoint(row_loss, *args, use_reentrant=False) if chunk else row_loss(*args)
        ce, kl = ce + c, kl + k
    return ce / labels.numel() if top_ids is None else (0.5 * ce + 0.5 * kl) / labels.numel()


def measure(a, config, kd, chunk):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    bf16 = a.params == "bf16"
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16 if bf16 else torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    torch._dynamo.reset()
    if a.compile == "whole":
        step_loss = functools.partial(torch.compile(loss_of), row_loss)
    else:
        for layer in model.model.layers:
            layer.compile()
        step_loss = functools.partial(loss_of, torch.compile(row_loss))
    n = a.sequences * a.length
    times = []
    for i in range(a.steps + 3):
        ids = torch.randint(0, config.vocab_size, (a.sequences, a.length + 1), device="cuda")
        top_ids = top_logp = None
        if kd:
            top_ids = torch.randint(0, config.vocab_size, (n, a.top_k), device="cuda")
            top_logp = torch.log_softmax(torch.randn(n, a.top_k + 1, device="cuda") * 3, -1)[:, :-1]
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=not bf16):
            loss = step_loss(model, ids, top_ids, top_logp, chunk)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        if i >= 3:
            times.append(time.perf_counter() - start)
    return n / statistics.median(times), torch.cuda.max_memory_allocated() / 2**30


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", required=True)
    p.add_argument("--length", type=int, default=2048)
    p.add_argument("--sequences", type=int, default=8)
    p.add_argument("--top-k", type=int, default=64)
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--loss", default="ce,kd")
    p.add_argument("--params", choices=("f32", "bf16"), default="f32")
    p.add_argument("--compile", choices=("layers", "whole"), default="layers")
    a = p.parse_args()
    torch.set_float32_matmul_precision("high")
    with open(a.config) as f:
        d = json.load(f)
    config = AutoConfig.for_model(d.pop("model_type"), **d)
    config.use_cache = False
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}; torch.compile ({a.compile}), fused AdamW, "
          f"{'BF16 parameters' if a.params == 'bf16' else 'float32 parameters, BF16 autocast'}, SDPA, batch {a.sequences} x {a.length}", flush=True)
    for name in a.loss.split(","):
        for chunk in (0, 4096):
            try:
                rate, memory = measure(a, config, name == "kd", chunk)
                print(f"{name.upper()} {rate:.0f} tokens/s, peak {memory:.1f} GiB{f', in chunks of {chunk} rows' if chunk else ''}", flush=True)
                break
            except torch.OutOfMemoryError:
                print(f"{name.upper()}{f' in chunks of {chunk} rows' if chunk else ''}: out of memory", flush=True)


if __name__ == "__main__":
    main()
