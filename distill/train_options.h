/* The options that `train` and `experiment` share: student, recipe, records. V(field): its offset in the command's values. */
#ifndef RT_DISTILL_TRAIN_OPTIONS_H
#define RT_DISTILL_TRAIN_OPTIONS_H

#define RT_TRAIN_RECIPE_OPTIONS(V) \
    {"student", RT_OPT_STRING, V(student), NULL, 0, 0, NULL, "DIR|RUN", "student to begin with: a model directory or a finished run", false, false}, \
    {"init-config", RT_OPT_STRING, V(init_config), NULL, 0, 0, NULL, "FILE", "config.json of a new student, random by --seed", false, false}, \
    {"tokenizer", RT_OPT_STRING, V(tokenizer), NULL, 0, 0, NULL, "DIR", "directory with tokenizer and template; default: the student's, or that of --init-config", false, false}, \
    {"template", RT_OPT_STRING, V(template_name), NULL, 0, 0, NULL, "NAME", "chat template to use instead of the directory's own", false, false}, \
    {"divergence", RT_OPT_CHOICE, V(divergence), "fkl", 0, 0, "fkl", NULL, "fkl: forward KL", false, false}, \
    {"kd-temperature", RT_OPT_FLOAT, V(kd_temperature), "1", 0.01, 100, NULL, "T", "temperature of both sides of the KL", false, false}, \
    {"teacher-temperature", RT_OPT_FLOAT, V(teacher_temperature), "0", 0, 100, NULL, "T", "of the teacher's side alone; 0: as --kd-temperature", false, false}, \
    {"tail", RT_OPT_CHOICE, V(tail), "bucket", 0, 0, "bucket|renorm", NULL, "ids that are not stored: one bucket with their exact mass, or left out and both sides renormalised", false, false}, \
    {"top-k", RT_OPT_INT, V(top_k), "0", 0, 4096, NULL, "N", "train on the N likeliest ids of each row; 0: on all that are stored", false, false}, \
    {"ce", RT_OPT_CHOICE, V(ce), "all", 0, 0, "all|rest", NULL, "cross-entropy on every target, or, where --w-kl is above 0, on those alone that have no teacher's row (`retarget` leaves some out)", false, false}, \
    {"alm-tau", RT_OPT_FLOAT, V(alm_tau), "100", 0.1, 1e6, NULL, "TAU", "temperature of the likelihoods of spans (--w-alm)", false, false}, \
    {"feature-loss", RT_OPT_CHOICE, V(feature_loss), "mse", 0, 0, "mse|cosine", NULL, "loss between projected student states and teacher states", false, false}, \
    {"layer-map", RT_OPT_STRING, V(layer_map), "auto", 0, 0, NULL, "auto|T:S,...", "teacher layer to student layer; auto: t to round(t Ls / Lt)", false, false}, \
    {"teacher-layers", RT_OPT_INT, V(teacher_layers), "0", 0, 1e6, NULL, "N", "layers of the teacher, for --layer-map auto; 0: as the shards say", false, false}, \
    {"lr", RT_OPT_FLOAT, V(lr), "1e-4", 0, 10, NULL, "LR", "peak learning rate", false, false}, \
    {"schedule", RT_OPT_CHOICE, V(schedule), "cosine", 0, 0, "cosine|linear|constant", NULL, "what follows the warm-up", false, false}, \
    {"min-lr", RT_OPT_FLOAT, V(min_lr), "0.1", 0, 1, NULL, "RATIO", "learning rate at the end, as a part of the peak", false, false}, \
    {"warmup", RT_OPT_FLOAT, V(warmup), "0.03", 0, 1e9, NULL, "N", "steps of warm-up; below 1: part of all steps", false, false}, \
    {"epochs", RT_OPT_INT, V(epochs), "0", 0, 1e6, NULL, "N", "passes over the data; default 1 where neither --steps nor --tokens is given", false, false}, \
    {"steps", RT_OPT_INT, V(steps), "0", 0, 1e12, NULL, "N", "optimiser steps", false, false}, \
    {"tokens", RT_OPT_INT, V(tokens), "0", 0, 1e15, NULL, "N", "tokens to train on", false, false}, \
    {"batch-tokens", RT_OPT_INT, V(batch_tokens), "16384", 1, 1e9, NULL, "N", "tokens of a global batch", false, false}, \
    {"micro-tokens", RT_OPT_INT, V(micro_tokens), "0", 0, 1e9, NULL, "N", "tokens of a micro-batch; 0: planned from memory", false, false}, \
    {"max-length", RT_OPT_INT, V(max_length), "0", 0, 1e9, NULL, "N", "leave longer sequences out; 0: refuse those over the student's maximum", false, false}, \
    {"eval-every", RT_OPT_INT, V(eval_every), "0", 0, 1e12, NULL, "N", "steps between evaluations; 0: only before the first step and at the end", false, false}, \
    {"save-every", RT_OPT_INT, V(save_every), "500", 0, 1e12, NULL, "N", "steps between checkpoints; 0: only when interrupted", false, true}, \
    {"keep", RT_OPT_INT, V(keep), "2", 2, 1e6, NULL, "N", "checkpoints to keep", false, true}, \
    {"weight-decay", RT_OPT_FLOAT, V(weight_decay), "0", 0, 10, NULL, "D", "decoupled, on matrices", false, false}, \
    {"beta1", RT_OPT_FLOAT, V(beta1), "0.9", 0, 0.99999, NULL, "B", "of AdamW", false, false}, \
    {"beta2", RT_OPT_FLOAT, V(beta2), "0.95", 0, 0.99999, NULL, "B", "of AdamW", false, false}, \
    {"eps", RT_OPT_FLOAT, V(eps), "1e-8", 1e-20, 1, NULL, "E", "of AdamW", false, false}, \
    {"moments", RT_OPT_CHOICE, V(moments), "f32", 0, 0, "f32|bf16", NULL, "AdamW's moments on a GPU; bf16, rounded stochastically, takes 4 bytes a parameter less", false, false}, \
    {"master", RT_OPT_CHOICE, V(master), "f32", 0, 0, "f32|none", NULL, "float32 masters of a GPU's bfloat16 parameters; none: they are rounded stochastically, which takes 2 bytes a parameter less", false, false}, \
    {"clip", RT_OPT_FLOAT, V(clip), "1", 0, 1e9, NULL, "NORM", "greatest global norm of the gradient; 0: none", false, false}, \
    {"on-nan", RT_OPT_CHOICE, V(on_nan), "skip", 0, 0, "skip|stop", NULL, "a step whose loss or gradient is not finite, or spikes, is left out, or ends the run", false, true}, \
    {"max-grad-spike", RT_OPT_FLOAT, V(max_grad_spike), "100", 0, 1e9, NULL, "X", "a step whose gradient norm is above X times its mean over the last 50 or so is treated as --on-nan says; 0: none is", false, false}, \
    {"grad-norms", RT_OPT_INT, V(grad_norms), "0", 0, 1e12, NULL, "N", "every N steps, the gradient norm of each term too; 0: never", false, true}, \
    {"recompute", RT_OPT_CHOICE, V(recompute), "auto", 0, 0, "auto|0|1|2|3", NULL, "what backward computes again instead of keeping it; 0: nothing, 1: norms, 2: gate and up too, 3: layers; auto: as memory needs, of some layers less than of others; the results are the same", false, true}, \
    {"loader-threads", RT_OPT_INT, V(loader_threads), "-1", -1, 256, NULL, "N", "threads that decode and pack sequences ahead; -1: as many as the device needs; 0: none; results do not depend on it", false, true}, \
    {"dtype", RT_OPT_CHOICE, V(dtype), "auto", 0, 0, "auto|bf16|f16|f32", NULL, "element type of the finished model; auto: that of the student's config", false, false}

#endif
