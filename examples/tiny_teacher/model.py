"""The DeepSeek-V3 architecture in PyTorch, shaped for a model this small.

All experts run on all tokens as one wide MLP whose hidden units are multiplied by the routing weights
(zero for experts not chosen): at this size that is faster than gathering tokens by expert, and exact.
Tokens come flat, as segments of (rows, length), so that one pass serves rows of several lengths.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

BLOCK, FP8_MAX = 128, 448.0

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128,
    "num_hidden_layers": 4, "num_nextn_predict_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8,
    "n_shared_experts": 1, "n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "moe_layer_freq": 1, "first_k_dense_replace": 1, "q_lora_rank": 128, "kv_lora_rank": 128,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 256, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "attention_bias": False, "attention_dropout": 0.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
    "aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1, "initializer_range": 0.02,
    "torch_dtype": "bfloat16", "use_cache": True,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
}


def blocks(w):
    """w, padded, as [rows, 128, columns, 128], and the scale of each block."""
    n, k = w.shape
    w = F.pad(w, (0, -k % BLOCK, 0, -n % BLOCK))
    tiles = w.view(w.shape[0] // BLOCK, BLOCK, w.shape[1] // BLOCK, BLOCK)
    return tiles, tiles.abs().amax((1, 3), keepdim=True).clamp(min=1e-12) / FP8_MAX


def quantize(w):
    """[N, K] float32 -> (float8_e4m3fn [N, K], scale_inv [ceil(N/128), ceil(K/128)])."""
    tiles, scale = blocks(w)
    codes = (tiles / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.flatten(2).flatten(0, 1)[:w.shape[0], :w.shape[1]], scale[:, 0, :, 0]


def dequantize(codes, scale):
    n, k = codes.shape
    return codes.float() * scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:n, :k]


def round_fp8(w):
    """What the checkpoint will hold, with the gradient of w itself."""
    with torch.no_grad():
        tiles, scale = blocks(w)
        held = (tiles / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
        delta = held.flatten(2).flatten(0, 1)[:w.shape[0], :w.shape[1]] - w
    return w + delta


def round_bf16(w):
    with torch.no_grad():
        delta = w.bfloat16().float() - w
    return w + delta


def round_activation(x):
    """The published model's 1x128 activation quantisation, to FP8 and back."""
    tiles = x.float().view(*x.shape[:-1], -1, BLOCK)
    scale = tiles.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    return ((tiles / scale).to(torch.float8_e4m3fn).float() * scale).view(x.shape)


def top_mask(x, k):
    """True for the k greatest of the last axis, the lower index first among equals; cheaper than topk on a dozen."""
    n = x.shape[-1]
    before = torch.ones(n, n, dtype=torch.bool, device=x.device).tril(-1)
    a, b = x[..., :, None], x[..., None, :]
    return ((b > a) | ((b == a) & before)).sum(-1) < k


def rope_frequencies(c):
    d, base, y = c["qk_rope_head_dim"], c["rope_theta"], c["rope_scaling"]
    f = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    turn = lambda rotations: d * math.log(y["original_max_position_embeddings"] / (rotations * 2 * math.pi)) / (2 * math.log(base))
    low, high = max(math.floor(turn(y["beta_fast"])), 0), min(math.ceil(turn(y["beta_slow"])), d - 1)
    ramp = ((torch.arange(d // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return f / y["factor"] * ramp + f * (1 - ramp)


def rotate(x, cos, sin):
    """x [T, heads, d] in interleaved pairs, as the checkpoint stores them."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


class Model(nn.Module):
    """held: the parameters already are the checkpoint's values; activations: quantise these too (w8a8)."""

    def __init__(self, config, dtype=torch.bfloat16, held=False, activations=False):
        super().__init__()
        self.c, self.dtype, self.held, self.activations = config, dtype, held, activations
        c, h = config, config["hidden_size"]
        depth = c["num_hidden_layers"] + 1      # the last one is the MTP layer
        heads, nope, rope, v = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        weights = {}

        def mat(name, n, k, gain=1.0):
            weights[name] = nn.Parameter(torch.randn(n, k) * gain * k ** -0.5)

        def norms(**widths):
            weights.update((name, nn.Parameter(torch.ones(n))) for name, n in widths.items())

        for i in range(depth):
            p = f"{i}_"
            norms(**{p + "input_norm": h, p + "post_norm": h, p + "q_a_norm": c["q_lora_rank"], p + "kv_a_norm": c["kv_lora_rank"]})
            mat(p + "q_a", c["q_lora_rank"], h)
            mat(p + "q_b", heads * (nope + rope), c["q_lora_rank"])
            mat(p + "kv_a", c["kv_lora_rank"] + rope, h)
            mat(p + "kv_b", heads * (nope + v), c["kv_lora_rank"])
            mat(p + "o", h, heads * v, 0.3)
            if i < c["first_k_dense_replace"]:
                inter = c["intermediate_size"]
            else:       # the shared expert is the last block of the stack
                inter = c["moe_intermediate_size"] * (c["n_routed_experts"] + 1)
                mat(p + "router", c["n_routed_experts"], h)
                self.register_buffer(f"bias_{i}", torch.zeros(c["n_routed_experts"]))
            mat(p + "gate", inter, h)
            mat(p + "up", inter, h)
            weights[p + "down"] = nn.Parameter(torch.randn(h, inter) * 0.3 * c["moe_intermediate_size"] ** -0.5)
        weights["embed"] = nn.Parameter(torch.randn(c["vocab_size"], h) * 0.04)
        mat("head", c["vocab_size"], h, 0.3)
        mat("eh", h, 2 * h)
        norms(norm=h, enorm=h, hnorm=h, mtp_norm=h)
        self.w = nn.ParameterDict(weights)
        self.register_buffer("freq", rope_frequencies(c).float())
        y = c["rope_scaling"]
        self.scale = (nope + rope) ** -0.5 * (0.1 * y["mscale_all_dim"] * math.log(y["factor"]) + 1) ** 2

    def p(self, name):
        w = self.w[name]
        return w if self.held else round_bf16(w)

    def linear(self, x, name, fp8=True):
        w = self.w[name]
        if not self.held:
            w = round_fp8(w) if fp8 else round_bf16(w)
        if fp8 and self.activations:
            x = round_activation(x)
        return F.linear(x.to(self.dtype), w.to(self.dtype))

    def norm(self, x, name, eps=None):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + (eps or self.c["rms_norm_eps"])) * self.p(name)

    def attention(self, x, i, segments, cos, sin):
        c, t = self.c, x.shape[0]
        heads, nope, rope, v = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        q = self.linear(self.norm(self.linear(x, f"{i}_q_a"), f"{i}_q_a_norm", 1e-6), f"{i}_q_b").view(t, heads, nope + rope)
        latent, k_rope = self.linear(x, f"{i}_kv_a").split([c["kv_lora_rank"], rope], -1)
        kv = self.linear(self.norm(latent, f"{i}_kv_a_norm", 1e-6), f"{i}_kv_b").view(t, heads, nope + v)
        q = torch.cat((q[..., :nope], rotate(q[..., nope:], cos, sin)), -1)
        k_rope = rotate(k_rope[:, None], cos, sin).expand(t, heads, rope)
        k = torch.cat((kv[..., :nope], k_rope), -1)
        # Fused attention wants one head width: the values are padded, and cut again.
        value = F.pad(kv[..., nope:], (0, nope + rope - v))
        out, at = [], 0
        for rows, length in segments:
            part = [z[at:at + rows * length].view(rows, length, heads, -1).transpose(1, 2) for z in (q, k, value)]
            o = F.scaled_dot_product_attention(*part, is_causal=True, scale=self.scale)
            out.append(o.transpose(1, 2)[..., :v].reshape(rows * length, heads * v))
            at += rows * length
        return self.linear(torch.cat(out), f"{i}_o")

    def route(self, x, i):
        """-> routing weights [T, experts], zero where an expert was not chosen."""
        c = self.c
        score = torch.sigmoid(F.linear(x.float(), self.p(f"{i}_router")))
        choice = (score + getattr(self, f"bias_{i}")).detach().unflatten(-1, (c["n_group"], -1))
        group = (choice * top_mask(choice, 2)).sum(-1)
        choice = choice.masked_fill(~top_mask(group, c["topk_group"])[..., None], -torch.inf).flatten(-2)
        kept = score * top_mask(choice, c["num_experts_per_tok"])
        return kept / (kept.sum(-1, keepdim=True) + 1e-20) * c["routed_scaling_factor"]

    def block(self, x, i, segments, cos, sin, loads):
        x = x + self.attention(self.norm(x, f"{i}_input_norm"), i, segments, cos, sin)
        h = self.norm(x, f"{i}_post_norm")
        a = F.silu(self.linear(h, f"{i}_gate")) * self.linear(h, f"{i}_up")
        if i < self.c["first_k_dense_replace"]:
            return x + self.linear(a, f"{i}_down")
        weight = self.route(h, i)
        loads.append(weight.detach() > 0)
        weight = torch.cat((weight, torch.ones_like(weight[:, :1])), -1)
        a = a.unflatten(-1, (weight.shape[-1], -1))
        if self.activations:        # an expert's input is quantised before its routing weight applies
            a = round_activation(a)
            y = (a * weight[..., None]).flatten(-2)
            return x + F.linear(y.to(self.dtype), self.w[f"{i}_down"].to(self.dtype))
        return x + self.linear((a * weight[..., None]).flatten(-2), f"{i}_down")

    def forward(self, tokens, segments, mtp=True):
        """-> (logits [T, V], MTP logits [T, V] or None, [experts chosen, bool [T, E]] a MoE layer).

        Row t of the MTP logits predicts token t+2 of its row; the last of a row is meaningless."""
        position = torch.cat([torch.arange(n, device=tokens.device).repeat(rows) for rows, n in segments])
        angle = position[:, None].float() * self.freq
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        embed, loads = self.p("embed"), []
        x = F.embedding(tokens, embed)
        for i in range(self.c["num_hidden_layers"]):
            x = self.block(x, i, segments, cos, sin, loads)
        x = self.norm(x, "norm")
        logits = self.linear(x, "head", fp8=False)
        if not mtp:
            return logits, None, loads
        e = F.embedding(tokens.roll(-1), embed)
        m = torch.cat((self.norm(e, "enorm"), self.norm(x, "hnorm")), -1)
        m = self.block(self.linear(m, "eh", fp8=False).float(), self.c["num_hidden_layers"], segments, cos, sin, loads)
        return logits, self.linear(self.norm(m, "mtp_norm"), "head", fp8=False), loads
