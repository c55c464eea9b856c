/* retort train: trains a student on text, on a teacher's rows and states, or on any mix of them. */
#include <stdio.h>

#include "core/pool.h"
#include "distill/run_record.h"
#include "distill/train_local.h"
#include "distill/train_options.h"
#include "distill/train_run.h"

#define V(field) offsetof(struct rt_train_values, field)
const struct rt_opt rt_train_options[] = {
    RT_TRAIN_RECIPE_OPTIONS(V),
    {"data", RT_OPT_LIST, V(data), NULL, 0, 0, NULL, "PATH[:WEIGHT]", "shards, JSON lines or a directory of traces; repeat it to mix; weight 0.5 takes half of it an epoch", true, false},
    {"out", RT_OPT_STRING, V(out), NULL, 0, 0, NULL, "RUN", "run directory; the same command resumes", true, true},
    {"name", RT_OPT_STRING, V(name), NULL, 0, 0, NULL, "NAME", "name of the run in reports; default: that of its directory", false, true},
    {"arm", RT_OPT_STRING, V(arm), NULL, 0, 0, NULL, "NAME", "arm of an experiment that the run belongs to", false, true},
    {"rank-timeout", RT_OPT_INT, V(rank_timeout), "600", 1, 1e6, NULL, "SECONDS", "of several ranks: longest silence of another one before the run ends", false, true},
    {"w-ce", RT_OPT_FLOAT, V(w_ce), "1", 0, 1e6, NULL, "W", "weight of the cross-entropy on the data's own tokens", false, false},
    {"w-kl", RT_OPT_FLOAT, V(w_kl), "0", 0, 1e6, NULL, "W", "weight of T^2 KL(teacher || student)", false, false},
    {"w-feature", RT_OPT_FLOAT, V(w_feature), "0", 0, 1e6, NULL, "W", "weight of the loss on hidden states", false, false},
    {"w-alm", RT_OPT_FLOAT, V(w_alm), "0", 0, 1e6, NULL, "W", "weight of the loss on likelihoods of spans: shards of `retarget --mode alm`", false, false},
    {"eval-data", RT_OPT_LIST, V(eval_data), NULL, 0, 0, NULL, "PATH", "shards or JSON lines to evaluate on, at the end and every --eval-every; may be repeated", false, false},
    {0},
};

/* RUN/run.json in one line. */
static enum rt_status print_run(const char *run, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *v = NULL;
    RT_TRY(rt_record_run(run, &v, err));
    if (v == NULL)
        RT_FAIL(err, IO, "%s: " RT_RUN_FILE " is gone", run);
    RT_TRY(rt_command_print_json(v, err));
out:
    rt_json_free(v);
    return st;
}

/* --gpus N without a launcher starts the ranks; what they do with it is nothing more. */
static enum rt_status run(struct rt_context *ctx, const void *values, const struct rt_positionals *pos, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_train_values *v = values;
    const struct rt_backend *be;
    const int gpus = (int)v->common.gpus;
    struct rt_train_outcome outcome = {0};
    struct rt_rank rank;
    int n_ops;
    const enum rt_op *ops = rt_student_train_ops(&n_ops);
    (void)pos;
    RT_TRY(rt_rank_from_env(&rank, err));
    if (rank.size > 1 && gpus > 1 && gpus != rank.size)
        RT_FAIL(err, USAGE, "--gpus %d, and a launcher started %d ranks: leave --gpus out, a rank takes one GPU", gpus, rank.size);
    if (gpus > 1 && rank.size == 1 && !v->common.dry_run) {
        RT_TRY(rt_backend_select(v->common.device, ops, n_ops, &be, err));
        RT_TRY(rt_command_gpus(&v->common, be, err));
        /* on the host the ranks share its cores */
        const int cores = rt_cpu_count() / gpus;
        RT_TRY(rt_train_local(ctx, gpus, be->own_memory || v->common.threads > 0 ? 0 : cores > 0 ? cores : 1, err));
        goto out;
    }
    RT_TRY(rt_train(ctx, v, &outcome, err));
    if (v->common.json && outcome.finished && rank.rank == 0)
        RT_TRY(print_run(v->out, err));
out:
    return st;
}

const struct rt_command rt_cmd_train = {
    .name = "train",
    .synopsis = "--student DIR|RUN --data PATH[:WEIGHT] [--data ...] --out RUN [OPTIONS]",
    .summary = "train a student on text (CE), on a teacher's rows (KL) and states, or any mix",
    .help = "The loss is w_ce CE + w_kl T^2 KL(teacher || student) + w_feature F + w_alm A, summed over the training rows of the whole global batch and\n"
            "divided by their number; A compares likelihoods of spans (shards of `retarget --mode alm`). RUN gets\n"
            "metrics.jsonl, eval.jsonl, checkpoints, run.json and model/, a Hugging Face directory; on a GPU also products.txt: which algorithm each product takes,\n"
            "measured once and kept, so that a resumed run has the same bytes. --json prints run.json as one line at the end.\n\n"
            "Several --data are shuffled together: an epoch takes each WEIGHT times (1 where none is given), :0.5 another half of it each time, :2 all of\n"
            "it twice. Beside shards, text without a teacher's rows takes the cross-entropy alone. The order depends on --seed and the data alone.\n\n"
            "--gpus N takes N GPUs of this machine; for several machines, or instead of it, torchrun, mpirun or srun start one process a GPU. The ranks share each\n"
            "global batch and the optimiser's states; RUN must be seen by all of them. They meet over TCP at MASTER_ADDR:MASTER_PORT, and add up over NCCL.\n\n"
            "    retort train --student Qwen2.5-0.5B --data shards/ --w-ce 0.5 --w-kl 0.5 --kd-temperature 2 --out runs/soft",
    .options = rt_train_options,
    .takes = RT_TAKES_ROOM | RT_TAKES_SEED | RT_TAKES_GPUS | RT_TAKES_JSON | RT_TAKES_DRY_RUN,
    .values_size = sizeof(struct rt_train_values),
    .run = run,
};
