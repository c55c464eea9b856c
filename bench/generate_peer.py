"""Decoding by PyTorch on the GPU, for bench_student_generate --peer.

    python3 bench/generate_peer.py SEQUENCES CONTEXT [1.5b|0.5b] [transformers,by_hand,static]

Random weights in bfloat16, caches of random numbers, then 96 steps at CONTEXT of one token for each sequence, each one CUDA graph: the model, softmax at
temperature 0.6 and a draw (without top-p: generate()'s own sorts the vocabulary). Three ways, a line each, "tokens/s X" being the median of the last 64 steps:

    by_hand        a decoder as one writes it for this: joined projections, torch.compile for what lies between them, attention as below
    transformers   its Qwen2 and StaticCache, attention by a function of our own (AttentionInterface): the query heads of a key head are rows of one
                   scaled_dot_product_attention without a mask, so that keys and values are read once
    static         its Qwen2 and StaticCache as they are: sdpa with a mask, for which keys and values are copied to every query head (not run unless named)
"""
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = {"1.5b": (1536, 8960, 28, 12, 128), "0.5b": (896, 4864, 24, 14, 64)}
V, KV, THETA = 151936, 2, 1e6
backend = None


def grouped(q, k, v):
    """q [n, nh, 1, d] over k, v [n, KV, L, d]: [n, nh, 1, d]."""
    n, nh, _, d = q.shape
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q.reshape(n, KV, nh // KV, d), k, v).reshape(n, nh, 1, d)


def choose_backend(n, context, heads, d):
    """The kernel of PyTorch that is fastest for this call."""
    global backend
    q = torch.randn(n, heads, 1, d, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(n, KV, context + 64, d, device="cuda", dtype=torch.bfloat16)[:, :, :context] for _ in range(2))
    best = None
    for b in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        backend = b
        try:
            grouped(q, k, v)
            torch.cuda.synchronize()
            t0 = time.perf_counter()
            for _ in range(5):
                grouped(q, k, v)
            torch.cuda.synchronize()
            t = (time.perf_counter() - t0) / 5
        except RuntimeError:
            continue
        if best is None or t < best[0]:
            best = (t, b)
    backend = best[1]
    print(f"attention by {backend.name}: {best[0] * 1e6:.0f} us, {2 * k.numel() * 2 / best[0] * 1e-9:.0f} GB/s", flush=True)


def draw(logits):
    return torch.multinomial(torch.softmax(logits.float() / 0.6, -1), 1)


def by_hand(n, context, shape):
    hidden, inter, layers, heads, d = shape
    q_dim, kv_dim = heads * d, KV * d

    def rand(*size):
        return torch.randn(*size, device="cuda") * 0.02
    table, norm = rand(V, hidden), torch.ones(hidden, device="cuda")
    weights = [(rand(q_dim + 2 * kv_dim, hidden), rand(q_dim + 2 * kv_dim), rand(hidden, q_dim), rand(2 * inter, hidden), rand(hidden, inter)) for _ in range(layers)]
    caches = [tuple(torch.randn(n, KV, context, d, device="cuda") for _ in range(2)) for _ in range(layers)]
    angle = (context - 1) * THETA ** (-torch.arange(0, d, 2, device="cuda", dtype=torch.float32) / d)
    cos, sin = angle.cos().repeat(2), angle.sin().repeat(2)

    @torch.compile(dynamic=False)
    def normed(x, branch):
        x = x + branch
        f = x.float()
        return x, ((f * torch.rsqrt(f.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * norm)

    @torch.compile(dynamic=False)
    def rotated(qkv):
        x = qkv[:, :q_dim + kv_dim].view(n, heads + KV, d).float()
        lo, hi = x.chunk(2, -1)
        x = (x * cos + torch.cat((-hi, lo), -1) * sin).to(qkv.dtype)
        return x[:, :heads].contiguous(), x[:, heads:]

    @torch.compile(dynamic=False)
    def gated(gu):
        g, u = gu.chunk(2, -1)
        return F.silu(g) * u

    def step(ids):
        x, branch = F.embedding(ids[:, 0], table), torch.zeros(n, hidden, device="cuda")
        for (qkv, bias, o, gate_up, down), (k, v) in zip(weights, caches):
            x, y = normed(x, branch)
            y = F.linear(y, qkv, bias)
            q, new = rotated(y)
            k[:, :, context - 1].copy_(new)
            v[:, :, context - 1].copy_(y[:, q_dim + kv_dim:].view(n, KV, d))
            branch = F.linear(grouped(q.unsqueeze(2), k, v).reshape(n, q_dim), o)
            x, y = normed(x, branch)
            branch = F.linear(gated(F.linear(y, gate_up)), down)
        return draw(F.linear(normed(x, branch)[1], table))
    return step


def by_transformers(n, context, shape, attention):
    from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM, StaticCache
    hidden, inter, layers, heads, _ = shape

    def attend(module, query, key, value, mask, **_):
        return grouped(query, key[:, :, :context], value[:, :, :context]).transpose(1, 2).contiguous(), None
    AttentionInterface.register("grouped", attend)
    config = Qwen2Config(vocab_size=V, hidden_size=hidden, intermediate_size=inter, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=KV, max_position_embeddings=32768, tie_word_embeddings=True, rope_theta=THETA)
    config._attn_implementation = attention
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config).eval()
    cache = StaticCache(config=config, max_cache_len=context + 64)
    position = torch.tensor([context - 1], device="cuda")

    def step(ids):
        logits = model(input_ids=ids, past_key_values=cache, cache_position=position, position_ids=position.unsqueeze(0).expand(n, 1), use_cache=True,
                       logits_to_keep=1).logits[:, -1]
        return draw(logits)
    step(torch.zeros(n, 1, dtype=torch.long, device="cuda"))
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    return step


def measure(name, n, step):
    ids = torch.randint(0, V, (n, 1), device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(ids)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids.copy_(step(ids))
    times = []
    for _ in range(96):
        torch.cuda.synchronize()
        t0 = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - t0)
    t = statistics.median(times[32:])
    print(f"tokens/s {n / t:.0f} ({name}, {t * 1e3:.2f} ms a step, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB)", flush=True)


def main():
    n, context = int(sys.argv[1]), int(sys.argv[2])
    shape = SHAPES[sys.argv[3] if len(sys.argv) > 3 else "1.5b"]
    ways = sys.argv[4].split(",") if len(sys.argv) > 4 else ["transformers", "by_hand"]
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.inference_mode():
        choose_backend(n, context, shape[3], shape[4])
        for way in ways:
            try:
                step = by_hand(n, context, shape) if way == "by_hand" else by_transformers(n, context, shape, "sdpa" if way == "static" else "grouped")
                measure(way, n, step)
            except Exception as e:  # the other way is still of interest
                print(f"{way}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}", flush=True)
            step = None
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


main()
