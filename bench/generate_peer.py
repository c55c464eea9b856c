"""Decoding by transformers on the GPU, for bench_student_generate --peer.

    python3 bench/generate_peer.py SEQUENCES CONTEXT [1.5b|0.5b] [graph|eager|compile]

Random weights in bfloat16, a static cache of random numbers, then 96 steps around CONTEXT of one token for each sequence: the model's
forward over one token, softmax at temperature 0.6 and a draw (without top-p: generate()'s own sorts the vocabulary). `graph` (the default): a step is one
CUDA graph of the eager kernels; `compile`: torch.compile, which takes minutes. Prints "tokens/s X", the median of the last 64 steps.
"""
import statistics
import sys
import time

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, StaticCache

SHAPES = {"1.5b": (1536, 8960, 28, 12), "0.5b": (896, 4864, 24, 14)}


def main():
    n, context = int(sys.argv[1]), int(sys.argv[2])
    hidden, inter, layers, heads = SHAPES[sys.argv[3] if len(sys.argv) > 3 else "1.5b"]
    how = sys.argv[4] if len(sys.argv) > 4 else "graph"
    config = Qwen2Config(vocab_size=151936, hidden_size=hidden, intermediate_size=inter, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True, rope_theta=1e6)
    config._attn_implementation = "sdpa"
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config).eval()
    cache = StaticCache(config=config, max_cache_len=context + 64)

    def step(ids, position):
        logits = model(input_ids=ids, past_key_values=cache, cache_position=position, position_ids=position.unsqueeze(0).expand(n, 1), use_cache=True,
                       logits_to_keep=1).logits[:, -1]
        return torch.multinomial(torch.softmax(logits.float() / 0.6, -1), 1)

    ids = torch.randint(0, 151936, (n, 1), device="cuda")
    with torch.inference_mode():
        step(ids, torch.tensor([0], device="cuda"))
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        position = torch.tensor([context - 48], device="cuda")
        run = torch.compile(step, mode="reduce-overhead") if how == "compile" else step
        if how == "graph":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step(ids, position)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                drawn = step(ids, position)

            def run(_ids, _position):
                graph.replay()
                return drawn
        times = []
        for i in range(96):
            torch.cuda.synchronize()
            t0 = time.perf_counter()
            ids.copy_(run(ids, position))
            position += 1
            torch.cuda.synchronize()
            times.append(time.perf_counter() - t0)
    print(f"tokens/s {n / statistics.median(times[32:]):.0f} ({how}, {statistics.median(times[32:]) * 1e3:.2f} ms a step, "
          f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB)", flush=True)


main()
