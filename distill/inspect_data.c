#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "distill/inspect.h"
#include "distill/jsonl.h"
#include "distill/model_dir.h"
#include "distill/retarget_run.h"
#include "formats/dataset.h"
#include "formats/shard.h"

enum { PATH_CAP = 4096, MAX_LOAD_LAYERS = 4096, MAX_LOAD_EXPERTS = 65536 };

/* ---- shards ---- */
static enum rt_status mass_json(const struct rt_row_identity *id, const struct rt_shard_info *info, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *list, *o;
    RT_TRY(rt_json_set_array(obj, "mass", &list, err));
    for (int i = 0; i < id->n_lse && id->top_k > 0; i++) {
        RT_TRY(rt_json_set_object(list, NULL, &o, err));
        RT_TRY(rt_json_set_double(o, "temperature", id->lse_temperature[i], err));
        RT_TRY(rt_json_set_double(o, "mean", info->mass[i], err));
        RT_TRY(rt_json_set_double(o, "least_sequence", info->mass_min[i], err));
        RT_TRY(rt_json_set_double(o, "mean_tail", 1 - info->mass[i], err));
    }
out:
    return st;
}

static enum rt_status lengths_json(const struct rt_shard_set *set, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *o;
    const struct rt_shard_info *info = rt_shard_set_info(set);
    int64_t shortest = INT64_MAX, longest = 0;
    for (int64_t i = 0; i < info->sequences; i++) {
        const int64_t n = rt_shard_set_seq(set, i)->n_tokens;
        shortest = n < shortest ? n : shortest;
        longest = n > longest ? n : longest;
    }
    if (info->sequences == 0)
        return RT_OK;
    RT_TRY(rt_json_set_object(obj, "sequence_tokens", &o, err));
    RT_TRY(rt_json_set_int(o, "shortest", shortest, err));
    RT_TRY(rt_json_set_double(o, "mean", (double)info->tokens / (double)info->sequences, err));
    RT_TRY(rt_json_set_int(o, "longest", longest, err));
out:
    return st;
}

/* One layer's counts, summed over the files of all parts. */
struct load {
    double total, most, least;
    int idle, experts;
    double entropy;
};

static enum rt_status load_row(const struct rt_json *const *files, int n_files, const char *dir, size_t layer, struct load *l, struct rt_err *err)
{
    const size_t experts = rt_json_len(rt_json_at(files[0], layer));
    *l = (struct load){.experts = (int)experts, .least = INFINITY};
    for (int pass = 0; pass < 2; pass++) /* the entropy needs the total */
        for (size_t e = 0; e < experts; e++) {
            double count = 0;
            for (int f = 0; f < n_files; f++) {
                int64_t v;
                const struct rt_json *row = rt_json_at(files[f], layer);
                if (rt_json_len(row) != experts || !rt_json_as_int(rt_json_at(row, e), &v) || v < 0)
                    return rt_fail(err, RT_FORMAT, "%s: expert_load: layer %zu expert %zu: expected a count in rows of %zu experts", dir, layer, e, experts);
                count += (double)v;
            }
            if (pass == 1) {
                l->entropy -= count > 0 ? count / l->total * log(count / l->total) : 0;
                continue;
            }
            l->total += count;
            l->most = count > l->most ? count : l->most;
            l->least = count < l->least ? count : l->least;
            l->idle += count == 0;
        }
    return RT_OK;
}

static enum rt_status load_json(const struct rt_json *const *files, int n_files, const char *dir, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *list, *o;
    struct load l;
    const size_t layers = rt_json_len(files[0]);
    RT_TRY(rt_json_set_array(obj, "expert_load", &list, err));
    for (int f = 0; f < n_files; f++)
        if (rt_json_len(files[f]) != layers || layers > MAX_LOAD_LAYERS)
            RT_FAIL(err, FORMAT, "%s: expert_load: files of %zu and %zu layers", dir, layers, rt_json_len(files[f]));
    for (size_t i = 0; i < layers; i++) {
        if (rt_json_len(rt_json_at(files[0], i)) > MAX_LOAD_EXPERTS)
            RT_FAIL(err, FORMAT, "%s: expert_load: layer %zu has more than %d experts", dir, i, MAX_LOAD_EXPERTS);
        RT_TRY(load_row(files, n_files, dir, i, &l, err));
        if (l.total == 0) /* a dense layer */
            continue;
        RT_TRY(rt_json_set_object(list, NULL, &o, err));
        RT_TRY(rt_json_set_int(o, "layer", (int64_t)i, err));
        RT_TRY(rt_json_set_int(o, "routed", (int64_t)l.total, err));
        RT_TRY(rt_json_set_double(o, "most_to_mean", l.most * l.experts / l.total, err));
        RT_TRY(rt_json_set_double(o, "least_to_mean", l.least * l.experts / l.total, err));
        RT_TRY(rt_json_set_int(o, "idle_experts", l.idle, err));
        RT_TRY(rt_json_set_double(o, "effective_experts", exp(l.entropy), err));
    }
out:
    return st;
}

static enum rt_status expert_load(const char *dir, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    enum { MOST = 256 };
    char **names = NULL, path[PATH_CAP];
    size_t n = 0;
    struct rt_json *doc[MOST] = {0};
    const struct rt_json *layers[MOST];
    int files = 0;
    RT_TRY(rt_list_dir(dir, &names, &n, err));
    for (size_t i = 0; i < n && files < MOST; i++) {
        const size_t len = strlen(names[i]);
        if (strncmp(names[i], "expert_load", 11) != 0 || len < 5 || strcmp(names[i] + len - 5, ".json") != 0)
            continue;
        RT_TRY(rt_path_join(path, sizeof path, dir, names[i], err));
        RT_TRY(rt_json_load(path, (size_t)256 << 20, &doc[files], err));
        layers[files] = rt_json_get(doc[files], "layers");
        files++;
        if (layers[files - 1] == NULL || rt_json_typeof(layers[files - 1]) != RT_JSON_ARRAY)
            RT_FAIL(err, FORMAT, "%s: expected a member \"layers\", a list of lists of counts", path);
    }
    if (files > 0)
        RT_TRY(load_json(layers, files, dir, obj, err));
out:
    for (int i = 0; i < files; i++)
        rt_json_free(doc[i]);
    rt_names_free(names, n);
    return st;
}

/* What retargeting made of the teacher's set: the sum of the shards' reports. */
static enum rt_status retargeted(const struct rt_shard_set *set, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_retarget_counts counts = {0};
    struct rt_json *o;
    const struct rt_row_identity *id = rt_shard_set_identity(set);
    if (id->origin.mode[0] == '\0' || rt_shard_set_info(set)->shards == 0)
        return RT_OK;
    RT_TRY(rt_retarget_counts_init(&counts, (uint32_t)id->n_ids, err));
    RT_TRY(rt_retarget_set_counts(set, &counts, err));
    RT_TRY(rt_json_set_object(obj, "retargeted", &o, err));
    RT_TRY(rt_retarget_report_json(&counts, NULL, o, err));
out:
    rt_retarget_counts_free(&counts);
    return st;
}

enum rt_status rt_inspect_shards(const char *path, const struct rt_inspect_options *o, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    struct rt_shard_set *set = NULL;
    struct rt_json *id;
    RT_TRY(rt_shard_set_open(path, &set, err));
    const struct rt_shard_info *info = rt_shard_set_info(set);
    const struct rt_row_identity *identity = rt_shard_set_identity(set);
    const double tokens = info->tokens > 0 ? (double)info->tokens : 1, rows = info->rows > 0 ? (double)info->rows : 1;
    if (o->verify)
        RT_TRY(rt_shard_set_verify(set, NULL, err));
    RT_TRY(rt_json_set_bool(obj, "finished", info->finished, err));
    RT_TRY(rt_json_set_int(obj, "parts", info->n_parts, err));
    RT_TRY(rt_json_set_int(obj, "parts_present", info->parts_present, err));
    if (info->missing[0] != '\0')
        RT_TRY(rt_json_set_string(obj, "parts_missing", info->missing, err));
    RT_TRY(rt_json_set_int(obj, "shards", info->shards, err));
    RT_TRY(rt_json_set_int(obj, "sequences", info->sequences, err));
    RT_TRY(rt_json_set_int(obj, "tokens", info->tokens, err));
    RT_TRY(rt_json_set_int(obj, "rows", info->rows, err));
    RT_TRY(rt_json_set_int(obj, "bytes", (int64_t)info->bytes, err));
    RT_TRY(rt_json_set_double(obj, "per_token_bytes", (double)info->bytes / tokens, err));
    RT_TRY(rt_json_set_double(obj, "per_row_bytes", (double)info->bytes / rows, err));
    RT_TRY(rt_json_set_double(obj, "teacher_nll", info->nll, err));
    if (o->verify)
        RT_TRY(rt_json_set_bool(obj, "verified", true, err));
    RT_TRY(lengths_json(set, obj, err));
    RT_TRY(mass_json(identity, info, obj, err));
    RT_TRY(rt_json_set_object(obj, "identity", &id, err));
    RT_TRY(rt_row_identity_to_json(identity, id, err));
    RT_TRY(retargeted(set, obj, err));
    if (rt_path_is_dir(path))
        RT_TRY(expert_load(path, obj, err));
out:
    rt_shard_set_free(set);
    return st;
}

/* ---- datasets ---- */
enum form { FORM_IDS, FORM_MESSAGES, FORM_PROMPT, FORM_TEXT, FORM_OTHER, FORMS };
static const char *const form_name[FORMS] = {"input_ids", "messages", "prompt", "text", "other"};

static enum form form_of(const struct rt_json *line)
{
    for (int f = 0; f < FORM_OTHER; f++)
        if (rt_json_get(line, form_name[f]) != NULL)
            return (enum form)f;
    return FORM_OTHER;
}

struct counted {
    int64_t lines, form[FORMS], ids, completions, answers;
    uint64_t bytes;
    bool torn;
};

static enum rt_status count_lines(const char *path, struct counted *c, struct rt_err *err)
{
    enum rt_status st;
    struct rt_jsonl f = {0};
    const struct rt_json *line;
    RT_TRY(rt_jsonl_open(path, &f, err));
    for (;;) {
        RT_TRY(rt_jsonl_next(&f, &line, err));
        if (line == NULL)
            break;
        const enum form form = form_of(line);
        c->lines++;
        c->form[form]++;
        if (form == FORM_IDS)
            c->ids += (int64_t)rt_json_len(rt_json_get(line, "input_ids"));
        c->completions += rt_json_get(line, "completion") != NULL;
        c->answers += rt_json_get(line, "answer") != NULL;
    }
    c->torn = f.torn;
    c->bytes = f.lines.end_offset;
out:
    rt_jsonl_close(&f);
    return st;
}

/* Tokens as training would see them; of prompts without completions, as a sampler would. */
static enum rt_status count_tokens(const char *path, const char *model, bool prompts, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    struct rt_model_dir m = {0};
    struct rt_dataset *d = NULL;
    struct rt_sample s;
    struct rt_prompt p;
    struct rt_json *o;
    int64_t longest = 0, sequences = 0, tokens = 0;
    bool end = false;
    RT_TRY(rt_model_dir_open(model, NULL, NULL, &m, err));
    if (m.tok == NULL)
        RT_FAIL(err, FORMAT, "%s: no tokenizer.json there: expected a model directory", model);
    const struct rt_dataset_options opt = {.tok = m.tok, .tmpl = m.tmpl};
    RT_TRY(rt_dataset_open(path, &opt, &d, err));
    for (;;) {
        st = prompts ? rt_dataset_next_prompt(d, &p, &end, err) : rt_dataset_next(d, &s, &end, err);
        if (st != RT_OK)
            goto out;
        if (end)
            break;
        const int64_t n = prompts ? p.n : s.n;
        longest = n > longest ? n : longest;
        sequences++;
        tokens += n;
    }
    const struct rt_dataset_counts c = rt_dataset_counts(d);
    RT_TRY(rt_json_set_object(obj, "tokenized", &o, err));
    RT_TRY(rt_json_set_string(o, "tokenizer", rt_tokenizer_path(m.tok), err));
    RT_TRY(rt_json_set_int(o, prompts ? "prompts" : "sequences", sequences, err));
    RT_TRY(rt_json_set_int(o, "tokens", tokens, err));
    RT_TRY(rt_json_set_int(o, "targets", prompts ? 0 : c.targets, err));
    RT_TRY(rt_json_set_int(o, "longest", longest, err));
    RT_TRY(rt_json_set_int(o, "without_targets", c.untargeted, err));
    RT_TRY(rt_json_set_int(o, "not_nfc", c.not_nfc, err));
out:
    rt_dataset_close(d);
    rt_model_dir_close(&m);
    return st;
}

/* Where `traces` is, or was, at work: how far it came. traces: what its file holds, where that is known. */
static enum rt_status traces_state(const char *dir, const struct counted *traces, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    char path[PATH_CAP];
    struct counted c = {0};
    if (!rt_path_has(dir, "config.json"))
        return RT_OK;
    RT_TRY(rt_path_join(path, sizeof path, dir, "traces.jsonl", err));
    if (traces == NULL && rt_path_exists(path))
        RT_TRY(count_lines(path, &c, err));
    RT_TRY(rt_inspect_traces(dir, traces != NULL ? traces->lines : c.lines, obj, err));
out:
    return st;
}

enum rt_status rt_inspect_dataset(const char *path, const struct rt_inspect_options *o, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    char file[PATH_CAP];
    struct counted c = {0};
    bool counted = false;
    struct rt_json *forms;
    snprintf(file, sizeof file, "%s", path);
    if (rt_path_is_dir(path)) {
        RT_TRY(rt_path_join(file, sizeof file, path, "accepted.jsonl", err));
        if (!rt_path_exists(file)) {
            RT_TRY(rt_path_join(file, sizeof file, path, "traces.jsonl", err));
            counted = rt_path_exists(file);
        }
        if (counted)
            RT_TRY(count_lines(file, &c, err));
        RT_TRY(traces_state(path, counted ? &c : NULL, obj, err));
        if (rt_json_get(obj, "state") != NULL && !rt_path_exists(file)) /* nothing of it yet */
            goto out;
    }
    if (!counted)
        RT_TRY(count_lines(file, &c, err));
    if (c.lines == 0 && rt_json_get(obj, "state") == NULL)
        RT_FAIL(err, FORMAT, "%s: no line in it", file);
    RT_TRY(rt_json_set_string(obj, "file", file, err));
    RT_TRY(rt_json_set_int(obj, "bytes", (int64_t)c.bytes, err));
    RT_TRY(rt_json_set_int(obj, "lines", c.lines, err));
    RT_TRY(rt_json_set_object(obj, "forms", &forms, err));
    for (int f = 0; f < FORMS; f++)
        if (c.form[f] > 0)
            RT_TRY(rt_json_set_int(forms, form_name[f], c.form[f], err));
    RT_TRY(rt_json_set_int(obj, "with_completion", c.completions, err));
    RT_TRY(rt_json_set_int(obj, "with_answer", c.answers, err));
    if (c.form[FORM_IDS] > 0)
        RT_TRY(rt_json_set_int(obj, "input_ids_tokens", c.ids, err));
    if (c.torn)
        RT_TRY(rt_json_set_bool(obj, "torn_last_line", true, err));
    if (o->tokenizer != NULL && c.lines > 0)
        RT_TRY(count_tokens(file, o->tokenizer, c.form[FORM_PROMPT] == c.lines && c.completions == 0, obj, err));
out:
    return st;
}
