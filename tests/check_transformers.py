"""Holds the example models against transformers, where PyTorch and transformers are installed.

  python tests/check_transformers.py [--teacher DIR] [--expected FILE] [--student DIR] [--student-expected FILE]
                                     [--retort BIN]

Teacher: its FP8 checkpoint is dequantised here, loaded as DeepseekV3ForCausalLM in float32, and the logits compared
with this file's own NumPy forward pass, with FILE (tensors input_ids and logits or w8a16.logits), and with the rows that
`retort logits` writes. Student: the directory is loaded unchanged; FILE as before, and the loss that `retort eval` finds.
The error is |a - b| / |b| of the whole tensor. Lines: PASS|FAIL|SKIP name value bound; exit status 1 after a FAIL.
"""
import argparse
import json
import math
import os
import subprocess
import sys
import tempfile

BOUND = 1e-3
HERE = os.path.dirname(os.path.abspath(__file__))
EXAMPLES = os.path.join(HERE, "..", "examples")
failed = False


def report(name, value, bound=BOUND):
    global failed
    good = value <= bound       # NaN fails
    failed |= not good
    print(f"{'PASS' if good else 'FAIL'} {name} {value:.3g} {bound:g}", flush=True)


def skip(name, why):
    print(f"SKIP {name}: {why}", flush=True)


try:
    import numpy as np
    import torch
    import transformers
    from safetensors import safe_open
    from safetensors.torch import save_file
except ImportError as e:
    skip("transformers", f"not installed ({e.name})")
    sys.exit(0)


def difference(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        return math.inf
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def read(path):
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}


def dequantised(folder):
    """Every tensor of the checkpoint in float32, FP8 blocks multiplied out."""
    with open(os.path.join(folder, "model.safetensors.index.json")) as f:
        index = json.load(f)["weight_map"]
    raw, out = {}, {}
    for shard in sorted(set(index.values())):
        raw.update(read(os.path.join(folder, shard)))
    for name, w in raw.items():
        if name.endswith("_scale_inv"):
            continue
        w = w.float()
        scale = raw.get(name + "_scale_inv")
        if scale is not None:
            n, k = w.shape
            w = w * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
        out[name] = w.contiguous()
    return out


def as_transformers(folder, weights, config):
    """The dequantised model in transformers, which has no MTP layer."""
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    config["num_nextn_predict_layers"] = 0
    config["torch_dtype"] = "float32"
    extra = f"model.layers.{config['num_hidden_layers']}."
    with tempfile.TemporaryDirectory() as d:
        with open(os.path.join(d, "config.json"), "w") as f:
            json.dump(config, f)
        save_file({k: v for k, v in weights.items() if not k.startswith(extra)}, os.path.join(d, "model.safetensors"),
                  metadata={"format": "pt"})
        model, info = transformers.DeepseekV3ForCausalLM.from_pretrained(
            d, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    wrong = [k for what in ("missing_keys", "unexpected_keys", "mismatched_keys") for k in info[what]]
    report("teacher.keys_not_matched", len(wrong), 0)
    return model.eval()


def plain_forward(w, c, ids):
    """The published formulas, one sequence, NumPy and float32."""
    w = {k: v.numpy() for k, v in w.items()}
    t, heads = len(ids), c["num_attention_heads"]
    nope, rope, v_dim = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    norm = lambda x, name, eps=c["rms_norm_eps"]: x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[name + ".weight"]
    linear = lambda x, name: x @ w[name + ".weight"].T
    y = c["rope_scaling"]
    f = c["rope_theta"] ** (-np.arange(0, rope, 2) / rope)
    dim = lambda n: rope * math.log(y["original_max_position_embeddings"] / (n * 2 * math.pi)) / (2 * math.log(c["rope_theta"]))
    low, high = max(math.floor(dim(y["beta_fast"])), 0), min(math.ceil(dim(y["beta_slow"])), rope - 1)
    ramp = np.clip((np.arange(rope // 2) - low) / (high - low), 0, 1)
    angle = np.outer(np.arange(t), f / y["factor"] * ramp + f * (1 - ramp))[:, None]
    scale = (nope + rope) ** -.5 * (.1 * y["mscale_all_dim"] * math.log(y["factor"]) + 1) ** 2

    def rotate(x):
        a, b, out = x[..., 0::2], x[..., 1::2], np.empty_like(x)
        out[..., 0::2] = a * np.cos(angle) - b * np.sin(angle)
        out[..., 1::2] = a * np.sin(angle) + b * np.cos(angle)
        return out

    def attention(x, p):
        q = linear(norm(linear(x, p + "q_a_proj"), p + "q_a_layernorm", 1e-6), p + "q_b_proj").reshape(t, heads, nope + rope)
        latent, k_rope = np.split(linear(x, p + "kv_a_proj_with_mqa"), [c["kv_lora_rank"]], -1)
        kv = linear(norm(latent, p + "kv_a_layernorm", 1e-6), p + "kv_b_proj").reshape(t, heads, nope + v_dim)
        s = np.einsum("thd,shd->hts", q[..., :nope], kv[..., :nope])
        s += np.einsum("thd,sd->hts", rotate(q[..., nope:]), rotate(k_rope[:, None])[:, 0])
        s = s * scale + np.triu(np.full((t, t), -np.inf), 1)
        s = np.exp(s - s.max(-1, keepdims=True))
        o = np.einsum("hts,shd->thd", s / s.sum(-1, keepdims=True), kv[..., nope:])
        return linear(o.reshape(t, heads * v_dim).astype(np.float32), p + "o_proj")

    def mlp(x, p):
        g = linear(x, p + "gate_proj")
        return linear(g / (1 + np.exp(-g)) * linear(x, p + "up_proj"), p + "down_proj")

    def moe(x, p):
        score = 1 / (1 + np.exp(-linear(x, p + "gate")))
        out = mlp(x, p + "shared_experts.")
        for i in range(t):
            b = (score[i] + w[p + "gate.e_score_correction_bias"]).reshape(c["n_group"], -1)
            groups = np.argsort(-np.sort(b, -1)[:, -2:].sum(-1), kind="stable")[:c["topk_group"]]
            masked = np.full_like(b, -np.inf)
            masked[groups] = b[groups]
            chosen = np.argsort(-masked.ravel(), kind="stable")[:c["num_experts_per_tok"]]
            share = score[i][chosen] / score[i][chosen].sum() * c["routed_scaling_factor"]
            for e, part in zip(chosen, share):
                out[i] += part * mlp(x[i:i + 1], f"{p}experts.{e}.")[0]
        return out

    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        x = x + attention(norm(x, p + "input_layernorm"), p + "self_attn.")
        h = norm(x, p + "post_attention_layernorm")
        x = x + (mlp(h, p + "mlp.") if i < c["first_k_dense_replace"] else moe(h, p + "mlp."))
    return linear(norm(x, "model.norm"), "lm_head")


@torch.no_grad()
def logits_of(model, ids):
    ids = torch.as_tensor(np.asarray(ids), dtype=torch.long)
    return model(input_ids=ids if ids.ndim == 2 else ids[None]).logits.float().numpy().reshape(*ids.shape, -1)


def sample_ids(folder):
    """Tokens of the model's own world, where routing and attention are at work; any tokens without a tokenizer."""
    if not os.path.exists(os.path.join(folder, "tokenizer.json")):
        return list(range(64))
    from tokenizers import Tokenizer
    text = "<｜begin▁of▁sentence｜><｜User｜>What is 47 + 38?<｜Assistant｜><think>\n47 + 30 = 77. 77 + 8 = 85.\n</think>\n\n\\boxed{85}"
    return Tokenizer.from_file(os.path.join(folder, "tokenizer.json")).encode(text, add_special_tokens=False).ids


def compare_file(name, model, path):
    expected = read(path)
    logits = expected["logits" if "logits" in expected else "w8a16.logits"]
    report(name, difference(logits_of(model, expected["input_ids"]), logits.float().numpy()))


def compare_retort(name, model, binary, folder, ids):
    """Every stored logit of `retort logits --cache topk` against the model."""
    with tempfile.TemporaryDirectory() as d:
        data = os.path.join(d, "data.jsonl")
        with open(data, "w") as f:
            f.write(json.dumps({"input_ids": ids}) + "\n")
        for command in ([binary, "logits", "--teacher", folder, "--data", data, "--out", os.path.join(d, "shards"),
                         "--cache", "topk=64", "--device", "ref"], [binary, "cat", os.path.join(d, "shards")]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return report(name, math.inf)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.strip()]
    truth = logits_of(model, ids)
    if len(rows) != len(ids) - 1:
        return report(name, math.inf)
    got = np.concatenate([r["logits"] for r in rows])
    report(name, difference(got, np.concatenate([truth[r["pos"]][r["ids"]] for r in rows])))


def compare_retort_student(name, model, binary, folder, ids):
    """The cross-entropy that `retort eval` finds on these ids against the model's own."""
    with tempfile.TemporaryDirectory() as d:
        data = os.path.join(d, "data.jsonl")
        with open(data, "w") as f:
            f.write(json.dumps({"input_ids": ids}) + "\n")
        done = subprocess.run([binary, "eval", "--student", folder, "--data", data, "--json"], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return report(name, math.inf)
    logits = torch.as_tensor(logits_of(model, ids))[:-1].double()
    truth = torch.nn.functional.cross_entropy(logits, torch.as_tensor(ids[1:])).item()
    report(name, abs(json.loads(done.stdout)["ce"] - truth) / truth, 1e-5)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", default=os.path.join(EXAMPLES, "tiny_teacher"))
    p.add_argument("--student", default=os.path.join(EXAMPLES, "tiny_student"))
    p.add_argument("--expected")
    p.add_argument("--student-expected")
    p.add_argument("--retort")
    o = p.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)

    with open(os.path.join(o.teacher, "config.json")) as f:
        config = json.load(f)
    weights = dequantised(o.teacher)
    teacher, ids = as_transformers(o.teacher, weights, config), sample_ids(o.teacher)
    report("teacher.logits_by_formula", difference(plain_forward(weights, config, ids), logits_of(teacher, ids)))
    if o.expected:
        compare_file("teacher.logits_expected", teacher, o.expected)
    else:
        skip("teacher.logits_expected", "no --expected FILE")
    if o.retort:
        compare_retort("teacher.logits_retort", teacher, o.retort, o.teacher, ids)
    else:
        skip("teacher.logits_retort", "no --retort BIN")

    student, info = transformers.AutoModelForCausalLM.from_pretrained(
        o.student, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    student.eval()
    report("student.keys_not_matched", len(info["missing_keys"]) + len(info["unexpected_keys"]), 0)
    report("student.not_finite", int((~np.isfinite(logits_of(student, sample_ids(o.student)))).sum()), 0)
    if o.retort:
        compare_retort_student("student.ce_retort", student, o.retort, o.student, sample_ids(o.student))
    else:
        skip("student.ce_retort", "no --retort BIN")
    if o.student_expected:
        compare_file("student.logits_expected", student, o.student_expected)
    else:
        skip("student.logits_expected", "no --student-expected FILE")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
