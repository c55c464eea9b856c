"""The published layout: names, FP8 blocks with weight_scale_inv, two shards and their index."""
import json
import os

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model import BLOCK, FP8_MAX, Model, dequantize, quantize

ATTENTION = {"q_a": "q_a_proj", "q_b": "q_b_proj", "kv_a": "kv_a_proj_with_mqa", "kv_b": "kv_b_proj", "o": "o_proj"}


def layout(c):
    """Yields (published name, parameter, kind, slice): kind is fp8, bf16 or bias; slice an expert's share of a stack."""
    n, inter = c["num_hidden_layers"], c["moe_intermediate_size"]
    yield "model.embed_tokens.weight", "embed", "bf16", None
    for i in range(n + 1):
        p = f"model.layers.{i}."
        if i == n:
            yield p + "embed_tokens.weight", "embed", "bf16", None
            yield p + "enorm.weight", "enorm", "bf16", None
            yield p + "hnorm.weight", "hnorm", "bf16", None
            yield p + "eh_proj.weight", "eh", "bf16", None
        yield p + "input_layernorm.weight", f"{i}_input_norm", "bf16", None
        for ours, theirs in ATTENTION.items():
            yield f"{p}self_attn.{theirs}.weight", f"{i}_{ours}", "fp8", None
        yield p + "self_attn.q_a_layernorm.weight", f"{i}_q_a_norm", "bf16", None
        yield p + "self_attn.kv_a_layernorm.weight", f"{i}_kv_a_norm", "bf16", None
        yield p + "post_attention_layernorm.weight", f"{i}_post_norm", "bf16", None
        if i < c["first_k_dense_replace"]:
            for part in ("gate", "up", "down"):
                yield f"{p}mlp.{part}_proj.weight", f"{i}_{part}", "fp8", None
        else:
            yield p + "mlp.gate.weight", f"{i}_router", "bf16", None
            yield p + "mlp.gate.e_score_correction_bias", f"bias_{i}", "bias", None
            for e in range(c["n_routed_experts"] + 1):
                name = f"experts.{e}" if e < c["n_routed_experts"] else "shared_experts"
                for part in ("gate", "up", "down"):
                    yield f"{p}mlp.{name}.{part}_proj.weight", f"{i}_{part}", "fp8", slice(e * inter, (e + 1) * inter)
        if i == n:
            yield p + "shared_head.norm.weight", "mtp_norm", "bf16", None
            yield p + "shared_head.head.weight", "head", "bf16", None
        if i == n - 1:
            yield "model.norm.weight", "norm", "bf16", None
            yield "lm_head.weight", "head", "bf16", None


def cut(w, name, part):
    if part is None:
        return w
    return w[:, part] if name.endswith("_down") else w[part]


def break_ties(embed, norm):
    """Moves by one BF16 step each embedding value that the first layer would quantise from midway between two codes.

    Products of so few bits hit the middle exactly, where the last bit of the norm decides: in w8a8 any two programs
    would disagree on about one token in twelve, at once and for good."""
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    middle = (table[1:] + table[:-1]) / 2
    x = (embed.double() * norm.double()).abs().unflatten(-1, (-1, BLOCK))
    x = (x / x.amax(-1, keepdim=True) * FP8_MAX).flatten(-2)
    above = torch.searchsorted(middle, x).clamp(max=len(middle) - 1)
    gap = torch.minimum((x - middle[above]).abs(), (x - middle[(above - 1).clamp(min=0)]).abs())
    tied = gap < 2e-6 * x       # rounding in float32 stays well below
    return (embed.view(torch.int16) - tied.short()).view(torch.bfloat16)       # one step towards zero


@torch.no_grad()
def save(model, out):
    tensors = {}
    for name, source, kind, part in layout(model.c):
        if kind == "bias":
            # A constant does not change the choice; above zero, masking by -inf and by 0 agree.
            bias = getattr(model, source).float().cpu()
            tensors[name] = bias - bias.min()
            continue
        w = cut(model.w[source].detach().float().cpu(), source, part)
        if kind == "fp8":
            tensors[name], tensors[name + "_scale_inv"] = (t.contiguous() for t in quantize(w))
        else:
            tensors[name] = w.bfloat16().contiguous()

    embed = break_ties(tensors["model.embed_tokens.weight"], tensors["model.layers.0.input_layernorm.weight"])
    for name in [k for k in tensors if k.endswith("embed_tokens.weight")]:
        tensors[name] = embed.clone()

    size = {k: v.numel() * v.element_size() for k, v in tensors.items()}
    shard, written, where = 1, 0, {}
    for k in tensors:
        # The cut falls between a weight and its scale, as it may in the published shards.
        if written > sum(size.values()) / 2 and k.endswith("_scale_inv"):
            shard = 2
        where[k] = shard
        written += size[k]
    file = lambda s: f"model-0000{s}-of-00002.safetensors"
    for s in (1, 2):
        save_file({k: tensors[k] for k in tensors if where[k] == s}, os.path.join(out, file(s)), metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(size.values())}, "weight_map": {k: file(s) for k, s in where.items()}}
    for name, value in (("config.json", model.c), ("model.safetensors.index.json", index)):
        with open(os.path.join(out, name), "w") as f:
            json.dump(value, f, indent=1)
            f.write("\n")


def load(folder, **how):
    """A Model that holds exactly the checkpoint's values."""
    with open(os.path.join(folder, "config.json")) as f:
        config = json.load(f)
    with open(os.path.join(folder, "model.safetensors.index.json")) as f:
        shards = sorted(set(json.load(f)["weight_map"].values()))
    model, tensors = Model(config, held=True, **how), {}
    for name in shards:
        with safe_open(os.path.join(folder, name), "pt") as f:
            tensors.update({k: f.get_tensor(k) for k in f.keys()})
    with torch.no_grad():
        for name, source, kind, part in layout(config):
            w = tensors[name]
            w = dequantize(w, tensors[name + "_scale_inv"]) if kind == "fp8" else w.float()
            cut(getattr(model, source) if kind == "bias" else model.w[source].data, source, part).copy_(w)
    return model.eval()
