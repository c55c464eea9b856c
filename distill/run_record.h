/* What a training run leaves for people, for `compare` and for other programs: names and members of its files.
 *
 *   RUN/config.json      the resolved command (formats/rundir.h)
 *   RUN/metrics.jsonl    a line an optimiser step
 *   RUN/eval.jsonl       a line an evaluation
 *   RUN/eval/NAME.jsonl  a line a sequence, or a problem, of one evaluation: what paired intervals are made of
 *   RUN/run.json         what the run is and came to; written at the start ("finished": false), replaced at the end
 *   RUN/ckpt-STEP/       checkpoints
 *   RUN/model/           the student, a Hugging Face directory
 *   DIR/experiment.json, DIR/arms/NAME-seedS/  an experiment: its arms are runs
 * Losses are means in nats; kl holds T^2 (T = kd_temperature), so that losses at different T are on one scale. null: unknown, or
 * not there. Numbers of bytes, tokens and seconds are whole runs', a resumed one's parts added up.
 *
 * run.json
 *   "version": 1, "name": text, "arm": text|null, "seed": int, "finished": bool
 *   "options": {name: text}           as config.json
 *   "weights": {"ce","kl","feature"}, "kd_temperature", "teacher_temperature", "tail": "bucket"|"renorm"
 *   "init": {"student": path|null, "config": path|null, "sha256": of the parameters before the first step}
 *   "data": [{"path","kind": "shards"|"jsonl"|"memory","weight","sequences","tokens","sha256": over the keys in order,
 *             "content_sha256": over what is learnt too (distill/source.h),
 *             "teacher","teacher_sha256","mode","top_k","mass": {"T": mean mass of the stored ids at T}}]   (teacher..: shards)
 *   "order_sha256"                    over the keys of all sequences of the run, in the order of training: equal for runs that saw the
 *                                     same tokens in the same order
 *   "student": {...}                  rt_student_describe
 *   "parameters", "steps", "planned_steps", "micro_tokens", "operations" (bytes that a GPU's operations may take beside their arguments), "tokens" (trained on), "targets", "skipped_steps",
 *   "clipped_steps" (how many), "seconds", "tokens_per_second", "peak_memory" (bytes, resident, of this run; of rank 0 where there are several), "flops" (of the training, forward and backward), "device", "ranks"
 *   "final": {"loss","ce","kl","feature","teacher_mass","student_mass","agreement","accuracy"}   means over rows of the last tenth of the steps
 *   "model": "model"                  relative to RUN, null before the end
 *
 * metrics.jsonl
 *   "step" (from 1), "loss", "ce" (a target; with --ce rest one that has no teacher row), "kl" (a row that has teacher rows), "feature",
 *   "teacher_mass", "student_mass" (of the teacher's ids, at T), "agreement" (argmax = the teacher's), "accuracy" (argmax = the label),
 *   "grad_norm" (before clipping), "clipped" (share of the gradient cut off: 1 - scale), "clipped_steps" (share of the optimiser's steps so far
 *   that were clipped), "lr", "tokens" (so far), "targets" (of this step), "ce_rows", "kl_rows", "feature_rows" (rows of this step that the means
 *   of ce and accuracy, of kl, mass and agreement, and of feature run over),
 *   "epoch" (fraction), "seconds", "tokens_per_second", "mfu" (operations of the step, 6 N + 6 L nh hd len a token, over seconds times the peak of
 *   the ranks' devices; null where that is not known), "memory" (bytes: of the device in use, or the process's peak), "seconds_left" (at the rate so far),
 *   "data_wait" (seconds waited for data since the process began); "skipped": true and "sequences": [...] where the step was left out, "spike": true where
 *   a gradient's spike was the reason;
 *   "grad_norm_ce", "grad_norm_kl", "grad_norm_feature" where asked for (--grad-norms)
 *
 * eval.jsonl
 *   "step" (0: before the first), "name" (that of the data's directory, or of its file without .jsonl, .json or .msgpack), "data" (path),
 *   "by": "train" (the parameters as they were in training)|"eval" (the saved model, in its element type), "kind": "shards"|"jsonl"
 *   A line of the same step is replaced by one that measures the same: name, data, by, temperature of the KL, sampling.
 *   "data_sha256"                     as run.json's, of the sequences that were scored                          not there without completions
 *   "n_sequences", "n_tokens" (targets), "ce", "ce_ci": [lo, hi], "perplexity", "accuracy", "accuracy_ci"      null without completions
 *   "kl_rows", "kl", "kl_ci", "kd_temperature", "agreement", "agreement_ci", "teacher_mass", "student_mass"   null
 *                                     without teacher rows
 *   "n_problems", "n_dropped" (more of them, whose prompts the student cannot hold), "problems_sha256" (prompts and answers), "samples", "temperature",
 *   "top_p", "max_tokens", "verify": "boxed"|"exact", "pass1", "pass1_ci", "passk": {"1": x, "2": x, ...}, "passk_ci": {"1": [lo, hi], ...}, "limit_share"
 *   (of the samples that hit max_tokens), "mean_tokens" (of a sample)                                        null without answers
 *   "per_sequence": "eval/FILE"|null, "seconds"
 *   Intervals: 95 %, distill/stats.h, clustered by sequence (losses, accuracy, agreement) or problem (pass@1, pass@k); null for one alone. pass@k is the
 *   unbiased 1 - C(n-c, k)/C(n, k), averaged over problems.
 *
 * RUN/eval/FILE: sums, so that any mean can be made of them
 *   {"kind":"sequence","key": 32 hex digits,"occurrence","line","targets","ce","correct","kl_rows","kl","agree"}
 *   {"kind":"problem","line","family": text|null,"samples","correct","limit","tokens"}
 *   Lines are in the order of the data: pair them by key and occurrence, or by line.
 *
 * experiment.json
 *   "version": 1, "finished": bool, "arms": [{"name","description","weights": {"ce","kl","feature"},"data": [paths],
 *   "runs": [{"seed","path": "arms/NAME-seedS","finished"}]}], "eval_data": [paths], "options": {name: text}
 */
#ifndef RT_DISTILL_RUN_RECORD_H
#define RT_DISTILL_RUN_RECORD_H

#include "core/mem.h"
#include "core/status.h"
#include "formats/json.h"

#define RT_RUN_FILE "run.json"
#define RT_EVAL_FILE "eval.jsonl"
#define RT_EVAL_DIR "eval"
#define RT_MODEL_DIR "model"
#define RT_EXPERIMENT_FILE "experiment.json"

/* *out = RUN/run.json, an object; NULL: there is none. Free with rt_json_free. */
enum rt_status rt_record_run(const char *run, struct rt_json **out, struct rt_err *err);
/* Publishes root as DIR/name. */
enum rt_status rt_record_publish(const char *dir, const char *name, const struct rt_json *root, struct rt_err *err);
/* Adds one evaluation, durably: rows as DIR/eval/NAME-STEP.jsonl (NAME.2, NAME.3, ... where another measurement has that file) and `line`,
 * which has "name" and "step" and gets "per_sequence". A line of the same step and key (distill/eval_key.h) is replaced. */
enum rt_status rt_record_eval(const char *dir, struct rt_json *line, const struct rt_buf *rows, struct rt_err *err);
/* Keeps the lines of DIR/eval.jsonl with "step" <= step, and drops a torn last one. For a resume from checkpoint `step`. */
enum rt_status rt_record_eval_truncate(const char *dir, int64_t step, struct rt_err *err);
/* Last part of a path, as a name; of "." and "..", that of the directory they are. Cut to 120 bytes, between characters. */
void rt_record_name(const char *path, char out[128]);
/* out = PATH/model where PATH is a run that has one, else PATH: what --student takes. Cap 4096. */
enum rt_status rt_record_student(const char *path, char *out, size_t cap, struct rt_err *err);

#endif
