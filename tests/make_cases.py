"""Makes the small cases in tests/data/cases: random models in the published layouts and what transformers computes with them.

  python tests/make_cases.py OUT        (needs torch, transformers, safetensors)

Teachers: input_ids, w8a16.hidden_i (after layer i-1; 0 = embeddings), w8a16.final, w8a16.logits. Students: see tests/oracle_student.c.
Everything follows from the seeds below; float32 throughout.
"""
import json
import os
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, LlamaConfig, Qwen2Config, Qwen3Config

BLOCK = 128
KEEP = ("norm", "embed_tokens", "lm_head", "mlp.gate.")     # not quantised in the published checkpoints


def quantise(w):
    """[N, K] -> e4m3 codes and a float32 scale for each 128x128 block."""
    n, k = w.shape
    full = F.pad(w, (0, -k % BLOCK, 0, -n % BLOCK)).view(-(-n // BLOCK), BLOCK, -(-k // BLOCK), BLOCK)
    scale = full.abs().amax((1, 3)).clamp(min=1e-12) / 448
    codes = (full / scale[:, None, :, None]).to(torch.float8_e4m3fn).reshape(-(-n // BLOCK) * BLOCK, -1)[:n, :k]
    return codes.contiguous(), scale.contiguous()


def dequantise(codes, scale):
    n, k = codes.shape
    return codes.float() * scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]


def fill(model, seed):
    """Random values that keep activations of order one, rounded to what the checkpoint can hold."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.data = 1 + 0.1 * torch.randn(p.shape, generator=g) if "norm" in name else 0.05 * torch.randn(p.shape, generator=g)
        else:
            p.data = torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5 * (1.5 if "embed" not in name else 8)
        p.data = p.data.bfloat16().float()
    for name, b in model.named_buffers():
        if "e_score_correction_bias" in name:
            b.copy_(0.05 * torch.randn(b.shape, generator=g))


def published(model):
    """State dict under the published names: experts one by one (transformers keeps them stacked)."""
    out = {}
    for name, v in model.state_dict().items():
        v = v.detach().float().clone()
        if name.endswith("experts.gate_up_proj"):
            for e in range(v.shape[0]):
                gate, up = v[e].chunk(2, 0)
                out[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate.contiguous()
                out[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up.contiguous()
        elif name.endswith("experts.down_proj"):
            for e in range(v.shape[0]):
                out[name.replace("down_proj", f"{e}.down_proj.weight")] = v[e].contiguous()
        else:
            out[name] = v
    return out


def teacher(out, config, extra, fp8, seed):
    os.makedirs(out, exist_ok=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    fill(model, seed)
    if fp8:     # the model computes with what the codes stand for
        for name, p in model.named_parameters():
            if p.ndim == 2 and not any(k in name for k in KEEP):
                p.data = dequantise(*quantise(p.data))
            if p.ndim == 3:
                half = p.shape[1] // 2 if "gate_up" in name else p.shape[1]
                p.data = torch.stack([torch.cat([dequantise(*quantise(part)) for part in w.split(half, 0)]) for w in p.data])
    files = [{}, {}]
    for i, (name, v) in enumerate(sorted(published(model).items())):
        if "e_score" in name:
            files[i % 2][name] = v
        elif fp8 and v.ndim == 2 and not any(k in name for k in KEEP):
            files[i % 2][name], files[(i + 1) % 2][name + "_scale_inv"] = quantise(v)     # a weight and its scale in different files
        else:
            files[i % 2][name] = v.bfloat16()
    index = {"metadata": {"total_size": sum(t.numel() * t.element_size() for f in files for t in f.values())}, "weight_map": {}}
    for i, f in enumerate(files):
        name = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file(f, os.path.join(out, name), metadata={"format": "pt"})
        index["weight_map"].update({k: name for k in f})
    json.dump(index, open(os.path.join(out, "model.safetensors.index.json"), "w"))
    json.dump(extra, open(os.path.join(out, "config.json"), "w"), indent=1)
    ids = torch.randint(2, config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(seed))
    states = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda m, a, o: states.append(o[0] if isinstance(o, tuple) else o))
    with torch.no_grad():
        r = model(ids, output_hidden_states=True)
    expected = {"input_ids": ids[0], "w8a16.logits": r.logits[0].contiguous(), "w8a16.final": r.hidden_states[-1][0].contiguous(),
                "w8a16.hidden_0": r.hidden_states[0][0].contiguous()}
    for i, s in enumerate(states):
        expected[f"w8a16.hidden_{i + 1}"] = s.reshape(24, -1).contiguous()
    save_file(expected, os.path.join(out, "expected.safetensors"))


def losses(logits, labels, top_ids, top_logits, lse):
    """Means over the labels that are not ignored, at T = 2: cross entropy, bucket KL and renormalised KL, both with T^2."""
    keep, T = labels >= 0, 2.0
    z, p, ids = logits[keep], (top_logits / T - lse[..., None])[keep], top_ids[keep]
    ce = F.cross_entropy(z, labels[keep])
    q = F.log_softmax(z / T, -1)
    qk = q.gather(-1, ids)
    rest_p, rest_q = 1 - p.exp().sum(-1), 1 - qk.exp().sum(-1)
    bucket = (p.exp() * (p - qk)).sum(-1) + rest_p * (rest_p / rest_q).log()
    pn, qn = p - p.logsumexp(-1, True), qk - qk.logsumexp(-1, True)
    return ce, T * T * bucket.mean(), T * T * (pn.exp() * (pn - qn)).sum(-1).mean()


def student(out, config, seed):
    os.makedirs(out, exist_ok=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    fill(model, seed)
    text = config.to_dict()
    keys = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads rms_norm_eps head_dim "
            "max_position_embeddings tie_word_embeddings model_type hidden_act attention_bias rope_parameters").split()
    text = {k: text[k] for k in keys if text.get(k) is not None} | {"architectures": [type(model).__name__], "torch_dtype": "bfloat16"}
    json.dump(text, open(os.path.join(out, "config.json"), "w"), indent=1)
    model.save_pretrained(os.path.join(out, "tmp"))
    weights = {k: v.detach().bfloat16().contiguous() for k, v in model.state_dict().items() if not (config.tie_word_embeddings and k == "lm_head.weight")}
    for f in os.listdir(os.path.join(out, "tmp")):
        os.remove(os.path.join(out, "tmp", f))
    os.rmdir(os.path.join(out, "tmp"))
    save_file(weights, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})
    g = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, config.vocab_size, (2, 12), generator=g)
    labels = torch.roll(ids, -1, 1)
    labels[:, -1] = -100
    labels[0, :3] = -100
    teacher_logits = 2 * torch.randn(2, 12, config.vocab_size, generator=g)
    top_logits, top_ids = teacher_logits.topk(5, -1)
    lse = [torch.logsumexp(teacher_logits / T, -1) for T in (1.0, 2.0)]
    r = model(ids, output_hidden_states=True)
    ce, bucket, renorm = losses(r.logits, labels, top_ids, top_logits, lse[1])
    (0.5 * ce + 0.5 * bucket).backward()
    e = {"input_ids": ids, "labels": labels, "topk_ids": top_ids, "topk_logits": top_logits, "lse_T1": lse[0], "lse_T2": lse[1],
         "logits": r.logits, "ce": ce, "kl_bucket_T2": bucket, "kl_renorm_T2": renorm, "loss": 0.5 * ce + 0.5 * bucket}
    e |= {f"hidden_{i}": h for i, h in enumerate(r.hidden_states)}
    e |= {f"grad.{n}": p.grad.clone() for n, p in model.named_parameters()}
    e["grad_norm"] = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    opt, steps = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), []
    for _ in range(4):
        opt.zero_grad()
        ce, bucket, _ = losses(model(ids).logits, labels, top_ids, top_logits, lse[1])
        loss = 0.5 * ce + 0.5 * bucket
        steps.append(loss.detach())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    e["adamw_losses"] = torch.stack(steps)
    save_file({k: v.detach().contiguous() for k, v in e.items()}, os.path.join(out, "expected.safetensors"))


def main(root):
    base = dict(hidden_size=128, num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=128,
                qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, intermediate_size=128, moe_intermediate_size=128, vocab_size=160,
                n_shared_experts=1, num_experts_per_tok=2, rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=128)
    yarn = dict(type="yarn", factor=4, original_max_position_embeddings=32, beta_fast=32, beta_slow=1)
    hf = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "moe_layer_freq": 1, "torch_dtype": "bfloat16",
          "bos_token_id": 0, "eos_token_id": 1, "num_nextn_predict_layers": 0}
    v3 = base | dict(q_lora_rank=128, n_routed_experts=8, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5,
                     rope_scaling=yarn | dict(mscale=1.0, mscale_all_dim=1.0))
    teacher(os.path.join(root, "v3_fp8"), DeepseekV3Config(**v3), v3 | hf | dict(
        architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", scoring_func="sigmoid", topk_method="noaux_tc", quantization_config=dict(
            activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128])), True, 1)
    v2 = base | dict(q_lora_rank=None, n_routed_experts=4, n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0, topk_method="greedy",
                     rope_scaling=yarn | dict(mscale=0.707, mscale_all_dim=0.707))
    teacher(os.path.join(root, "v2_bf16"), DeepseekV2Config(**v2), v2 | hf | dict(
        architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", scoring_func="softmax"), False, 2)
    s = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64, rms_norm_eps=1e-6)
    student(os.path.join(root, "qwen2"), Qwen2Config(**s, tie_word_embeddings=True), 3)
    student(os.path.join(root, "qwen3"), Qwen3Config(**s, head_dim=16, tie_word_embeddings=True), 4)
    student(os.path.join(root, "llama3"), LlamaConfig(**s, tie_word_embeddings=False, rope_scaling=dict(
        rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)), 5)


if __name__ == "__main__":
    main(sys.argv[1])
