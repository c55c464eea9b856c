"""Trains the tiny student, a Qwen2 of 0.3M parameters, on true arithmetic traces until it is right about 80 % of the time.

  python train.py --teacher DIR --out DIR [--steps N] [--seed S] [--target 0.8] [--device cuda|cpu]

It knows the format of a trace and some arithmetic, so that every way of distilling can start from it and improve on it.
"""
import argparse
import json
import math
import os
import random
import shutil
import sys
import time

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tiny_teacher"))
import batches
import world
from evaluate import boxed
from make_tokenizer import prompt_text

SHAPE = dict(vocab_size=1024, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=256, max_position_embeddings=1024, tie_word_embeddings=True, rope_theta=10000.0,
             bos_token_id=0, eos_token_id=1, pad_token_id=2)


def arithmetic_batch(encoder, seed, step):
    return [np.concatenate(z) for z in zip(*batches.arithmetic_part(encoder, random.Random(f"student {seed} {step}")))]


@torch.no_grad()
def accuracy(model, encoder, n, device):
    """Greedy, on problems drawn from another seed than training."""
    lines = [world.arithmetic(random.Random(f"student evaluation {i}")) for i in range(n)]
    prompts, groups, right = [encoder.ids(prompt_text(line["prompt"])) for line in lines], {}, 0
    for ids, line in zip(prompts, lines):
        groups.setdefault(len(ids), []).append((ids, line))
    for group in groups.values():
        rows = torch.tensor([ids for ids, _ in group], device=device)
        cache, now, new = None, rows, []
        for _ in range(96):
            out = model(input_ids=now, past_key_values=cache, use_cache=True)
            cache, now = out.past_key_values, out.logits[:, -1:].argmax(-1)
            new.append(now)
            if (torch.cat(new, 1) == 1).any(1).all():
                break
        for ids, (_, line) in zip(torch.cat(new, 1).tolist(), group):
            text = encoder.tokenizer.decode(ids[:ids.index(1)] if 1 in ids else ids, skip_special_tokens=False)
            right += boxed(text) == line["answer"]
    return right / n


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", required=True, help="where the tokenizer is")
    p.add_argument("--out", required=True)
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--target", type=float, default=0.8)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--device", default="cuda")
    o = p.parse_args()
    start = time.time()
    stream = batches.stream(o.teacher, o.seed, o.steps, o.workers, arithmetic_batch)
    encoder = batches.Encoder(o.teacher)
    first = next(stream)
    torch.manual_seed(o.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).to(o.device)
    print(f"{sum(w.numel() for w in model.parameters()) / 1e6:.3f}M parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=o.device == "cuda")
    cut = batches.SHORT[0] * batches.SHORT[1]
    for step in range(o.steps):
        ids, weight = (torch.from_numpy(x).to(o.device) for x in (first if step == 0 else next(stream)))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / o.steps)))
        total = 0.0
        with torch.autocast(o.device, dtype=torch.bfloat16):
            for (rows, length), x, w in ((batches.SHORT, ids[:cut], weight[:cut]), (batches.LONG, ids[cut:], weight[cut:])):
                z = model(input_ids=x.view(rows, length)).logits.float()
                ce = F.cross_entropy(z[:, :-1].flatten(0, 1), x.view(rows, length)[:, 1:].flatten().long(), reduction="none")
                total = total + (ce * w.view(rows, length)[:, :-1].flatten()).sum()
        (total / weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step + 1 >= 400 and (step + 1) % 50 == 0:
            model.eval()
            right = accuracy(model, encoder, 300, o.device)
            model.train()
            print(f"{step + 1:6d} loss {(total / weight.sum()).item():.4f} right {right:.3f}  {time.time() - start:.0f} s", flush=True)
            if right >= o.target:
                break
    model = model.to(torch.bfloat16).eval()
    os.makedirs(o.out, exist_ok=True)
    weights = {k: w.contiguous() for k, w in model.state_dict().items() if k != "lm_head.weight"}       # tied
    save_file(weights, os.path.join(o.out, "model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(o.out, "config.json"), "w") as f:
        # As Qwen2 models are published; newer releases of transformers would spell some of it differently.
        json.dump({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SHAPE, "rms_norm_eps": 1e-6,
                   "hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
                   "use_sliding_window": False, "torch_dtype": "bfloat16"}, f, indent=1)
        f.write("\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(o.teacher, name), o.out)
    print(f"exported: right {accuracy(model.float(), encoder, 1000, o.device):.4f} of 1000, greedy; {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
