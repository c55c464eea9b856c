#!/usr/bin/env python3
"""The peer of bench_teacher_stream: one mixture layer of transformers' DeepseekV3 at full geometry, BF16, resident on the GPU.

    python3 bench/teacher_peer.py [--length 4096] [--tokens 16384,32768] [--experts grouped_mm,batched_mm,eager]

Prints tokens/s of the layer and, divided by the 61 layers of the model, the rate that a machine holding all 1.34 TB of BF16 weights would
reach with nothing lost between layers. Needs PyTorch, transformers and about 70 GB of GPU memory.
"""
import argparse
import statistics

import torch
import transformers
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3


def make_layer(experts, length):
    config = DeepseekV3Config(max_position_embeddings=length, attn_implementation="sdpa")
    config._attn_implementation = "sdpa"
    config._experts_implementation = experts
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        layer = v3.DeepseekV3DecoderLayer(config, layer_idx=config.first_k_dense_replace)
        rotary = v3.DeepseekV3RotaryEmbedding(config)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "norm" not in name:
                p.normal_(0, p.shape[-1] ** -0.5)
        for name, b in layer.named_buffers():
            if "correction" in name:
                b.zero_()
    return config, layer.eval(), rotary


def measure(config, layer, rotary, length, tokens, repeats):
    x = torch.randn(tokens // length, length, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    position = torch.arange(length, device="cuda")[None]
    embeddings = rotary(x, position)
    times = []
    with torch.inference_mode():
        for i in range(repeats + 2):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            layer(x, attention_mask=None, position_ids=position, position_embeddings=embeddings)
            end.record()
            torch.cuda.synchronize()
            if i >= 2:
                times.append(start.elapsed_time(end) / 1e3)
    return tokens / statistics.median(times)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--length", type=int, default=4096)
    p.add_argument("--tokens", default="16384,32768")
    p.add_argument("--experts", default="grouped_mm,eager")
    p.add_argument("--repeats", type=int, default=5)
    a = p.parse_args()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}; {a.length} tokens a sequence")
    for experts in a.experts.split(","):
        config = layer = rotary = None
        torch.cuda.empty_cache()
        try:
            config, layer, rotary = make_layer(experts, a.length)
            for tokens in map(int, a.tokens.split(",")):
                rate = measure(config, layer, rotary, a.length, tokens, a.repeats)
                print(f"  {experts:12s} {tokens:7d} tokens: {rate:9.0f} tokens/s a layer, {rate / config.num_hidden_layers:7.0f} tokens/s over 61 layers", flush=True)
        except Exception as e:  # a peer that cannot run is reported, the others still run
            print(f"  {experts:12s} failed: {type(e).__name__}: {str(e)[:200]}", flush=True)


if __name__ == "__main__":
    main()
