#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "distill/doctor.h"
#include "distill/run_record.h"
#include "formats/safetensors.h"
#include "teacher/teacher.h"

/* ---- the two models ---- */
static enum rt_status text_side(struct rt_doctor *d, const char *who, const char *dir, struct rt_model_dir *m, struct rt_err *err)
{
    enum rt_status st;
    struct rt_err bad = {0};
    char name[40];
    snprintf(name, sizeof name, "%s.tokenizer", who);
    st = rt_model_dir_open(dir, NULL, NULL, m, &bad);
    if (st == RT_NOMEM)
        return rt_fail(err, st, "%s", bad.msg);
    if (st != RT_OK)
        return rt_check_add(&d->checks, err, RT_CHECK_FAIL, name, "%s", bad.msg);
    if (m->tok == NULL)
        return rt_check_add(&d->checks, err, RT_CHECK_WARN, name, "%s has no tokenizer.json: only input_ids lines can be used%s", dir,
                            who[0] == 's' ? "; train and eval take another directory's with --tokenizer DIR" : "");
    return rt_check_add(&d->checks, err, RT_CHECK_PASS, name, "%" PRIu32 " ids, sha256 %.12s", rt_tokenizer_n_ids(m->tok), rt_tokenizer_sha256(m->tok));
}

static enum rt_status vocabulary(struct rt_doctor *d, const char *who, const struct rt_model_dir *m, int64_t rows, struct rt_err *err)
{
    char name[40];
    snprintf(name, sizeof name, "%s.vocabulary", who);
    if (m->tok == NULL)
        return rt_check_add(&d->checks, err, RT_CHECK_PASS, name, "%" PRId64 " rows of the head; every one counts as an id, for want of a tokenizer", rows);
    const int64_t ids = rt_tokenizer_n_ids(m->tok);
    if (ids > rows)
        return rt_check_add(&d->checks, err, RT_CHECK_FAIL, name, "tokenizer.json has ids up to %" PRId64 ", the head has %" PRId64
                            " rows: tokens could not be looked up; the tokenizer is of another model", ids - 1, rows);
    if (ids < rows)
        return rt_check_add(&d->checks, err, RT_CHECK_PASS, name, "%" PRId64 " ids in %" PRId64 " rows: %" PRId64 " padded rows, left out of softmax, top-k and rank",
                            ids, rows, rows - ids);
    return rt_check_add(&d->checks, err, RT_CHECK_PASS, name, "%" PRId64 " ids, as many rows", ids);
}

static enum rt_status open_teacher(struct rt_doctor *d, struct rt_err *err)
{
    enum rt_status st;
    struct rt_err bad = {0};
    struct rt_tensors *t = NULL;
    struct rt_weights *w = NULL;
    char bytes[32];
    st = rt_teacher_config_load(d->teacher, &d->tc, &bad);
    if (st != RT_OK)
        return rt_check_add(&d->checks, err, RT_CHECK_FAIL, "teacher.config", "%s", bad.msg);
    d->have_teacher = true;
    RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_PASS, "teacher.config", "%s, %d layers, %d experts, context %" PRId64, d->tc.model_type, d->tc.layers,
                        d->tc.experts, d->tc.max_position));
    const struct rt_weights_options wo = {.dir = d->teacher, .config = &d->tc, .device = &d->device};
    st = rt_weights_open(&wo, &w, &bad);
    if (st == RT_OK)
        st = rt_tensors_open(d->teacher, &t, &bad);
    if (st != RT_OK) {
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_FAIL, "teacher.weights", "%s", bad.msg));
    } else {
        d->teacher_bytes = rt_weights_model_bytes(w);
        snprintf(d->teacher_sha256, sizeof d->teacher_sha256, "%s", rt_tensors_sha256(t));
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_PASS, "teacher.weights", "every tensor is there with its shape: %s in %d files",
                            rt_human_bytes(bytes, d->teacher_bytes), rt_tensors_n_files(t)));
    }
    RT_TRY(text_side(d, "teacher", d->teacher, &d->tm, err));
    RT_TRY(vocabulary(d, "teacher", &d->tm, d->tc.vocab_size, err));
out:
    rt_tensors_free(t);
    rt_weights_free(w);
    return st;
}

static enum rt_status open_student(struct rt_doctor *d, struct rt_err *err)
{
    enum rt_status st;
    struct rt_err bad = {0};
    struct rt_tensors *t = NULL;
    char count[32];
    st = rt_record_student(d->student, d->student_dir, sizeof d->student_dir, &bad);
    if (st == RT_OK)
        st = rt_student_config_load(d->student_dir, &d->sc, &bad);
    if (st != RT_OK)
        return rt_check_add(&d->checks, err, RT_CHECK_FAIL, "student.config", "%s", bad.msg);
    st = rt_tensors_open(d->student_dir, &t, &bad);
    if (st == RT_OK)
        st = rt_params_check_model(&d->sc, t, true, NULL, &bad);
    if (st != RT_OK)
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_FAIL, "student.weights", "%s", bad.msg));
    RT_TRY(rt_params_create(&d->sc, &d->sp, err));
    d->have_student = true;
    RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_PASS, "student.config", "%s, %d layers, %s parameters, context %" PRId64,
                        rt_student_family_name(d->sc.family), d->sc.layers, rt_human_count(count, (double)d->sp.count), d->sc.max_position));
    if (t != NULL && bad.status == RT_OK)
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_PASS, "student.weights", "every tensor is there with its shape"));
    RT_TRY(text_side(d, "student", d->student_dir, &d->sm, err));
    RT_TRY(vocabulary(d, "student", &d->sm, d->sc.vocab_size, err));
out:
    rt_tensors_free(t);
    return st;
}

/* ---- canaries of a template ---- */
#define PROMPT "What is 6 times 7?"
#define THOUGHT "Six sevens are forty-two."
#define ANSWER "The answer is 42."
#define COMPLETION "<think>\n" THOUGHT "\n</think>\n\n" ANSWER

static bool contains(const struct rt_buf *b, const char *s)
{
    return b->data != NULL && memmem(b->data, b->len, s, strlen(s)) != NULL;
}

static bool ends_with(const struct rt_buf *b, const char *s, size_t n)
{
    return b->len >= n && memcmp(b->data + b->len - n, s, n) == 0;
}

/* Bytes of the ids that are targets. */
static enum rt_status target_text(const struct rt_tokenizer *tok, const struct rt_rendered *r, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (size_t i = 0; i < r->enc.n; i++)
        if (r->loss_mask[i])
            RT_TRY(rt_tokenizer_decode(tok, &r->enc.ids[i], 1, false, out, err));
out:
    return st;
}

static int64_t count_id(const struct rt_rendered *r, int64_t id)
{
    int64_t n = 0;
    for (size_t i = 0; i < r->enc.n; i++)
        n += r->enc.ids[i] == id;
    return n;
}

/* Families whose template prints BOS itself. */
static bool prints_bos(const char *family)
{
    return strncmp(family, "deepseek", 8) == 0 || strncmp(family, "llama3", 6) == 0;
}

static enum rt_status check_bos(struct rt_doctor *d, const char *who, const struct rt_model_dir *m, const struct rt_rendered *r, struct rt_err *err)
{
    char name[40];
    const int64_t bos = rt_tokenizer_bos(m->tok), n = bos >= 0 ? count_id(r, bos) : 0;
    const bool wanted = bos >= 0 && prints_bos(rt_template_name(m->tmpl));
    snprintf(name, sizeof name, "%s.bos", who);
    if (bos < 0)
        return rt_check_add(&d->checks, err, RT_CHECK_PASS, name, "the tokenizer has none");
    if (n > 1 || (n == 1 && r->enc.ids[0] != bos) || (wanted && n == 0))
        return rt_check_add(&d->checks, err, RT_CHECK_FAIL, name, "a rendered conversation has the BOS id %" PRId64 " %" PRId64 " times%s: expected %s", bos, n,
                            n > 0 && r->enc.ids[0] != bos ? ", not in front" : "", wanted ? "once, in front" : "at most once, in front");
    return rt_check_add(&d->checks, err, RT_CHECK_PASS, name, "id %" PRId64 " %s", bos, n == 1 ? "once, in front" : "is not printed by this template");
}

/* Targets of the last turn: all of its text, thought included, and the end token. */
static enum rt_status check_whole(struct rt_doctor *d, const char *who, const struct rt_model_dir *m, struct rt_rendered *r, struct rt_err *err)
{
    enum rt_status st;
    struct rt_err bad = {0};
    struct rt_buf text = {0};
    char name[40];
    const struct rt_message turn[] = {{.role = "user", .content = PROMPT, .content_len = strlen(PROMPT), .loss = -1},
                                      {.role = "assistant", .content = ANSWER, .content_len = strlen(ANSWER), .reasoning = THOUGHT,
                                       .reasoning_len = strlen(THOUGHT), .loss = -1}};
    snprintf(name, sizeof name, "%s.last_turn", who);
    if (rt_template_render(m->tmpl, turn, 2, "canary", r, &bad) != RT_OK)
        return rt_check_add(&d->checks, err, RT_CHECK_FAIL, name, "%s", bad.msg);
    RT_TRY(target_text(m->tok, r, &text, err));
    const uint32_t end = rt_template_end_id(m->tmpl);
    const bool ended = end == UINT32_MAX || (r->enc.n > 0 && count_id(r, end) > 0);
    bool end_target = end == UINT32_MAX;
    for (size_t i = 0; i < r->enc.n; i++)
        end_target |= r->enc.ids[i] == end && r->loss_mask[i];
    if (!contains(&text, THOUGHT) || !contains(&text, ANSWER))
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_FAIL, name, "the targets of an answer with a thought are '%.200s': the turn is cut", text.data != NULL ? text.data : ""));
    else if (contains(&text, PROMPT))
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_FAIL, name, "the targets hold the prompt: the mask is wrong"));
    else
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_PASS, name, "an answer's thought and text are targets, the prompt is not"));
    snprintf(name, sizeof name, "%s.end_token", who);
    if (!ended || !end_target)
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_FAIL, name, "the end token %" PRIu32 " is no target: a student would not learn to stop", end));
    else if (end == UINT32_MAX)
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_WARN, name, "the tokenizer names no end token: a student would not learn to stop"));
    else
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_PASS, name, "id %" PRIu32 " ends an answer and is a target", end));
    RT_TRY(check_bos(d, who, m, r, err));
out:
    rt_buf_free(&text);
    return st;
}

/* prompt + completion must be what a sampler saw and said: the prompt's ids, then those of the completion. */
static enum rt_status check_generation(struct rt_doctor *d, const char *who, const struct rt_model_dir *m, struct rt_rendered *whole,
                                       struct rt_rendered *prompt, struct rt_err *err)
{
    enum rt_status st;
    struct rt_err bad = {0};
    struct rt_buf text = {0};
    const char *end = NULL;
    size_t end_len = 0;
    char name[40];
    const struct rt_message turn = {.role = "user", .content = PROMPT, .content_len = strlen(PROMPT), .loss = -1};
    snprintf(name, sizeof name, "%s.generation", who);
    if (rt_template_completion(m->tmpl, &turn, 1, COMPLETION, strlen(COMPLETION), "canary", whole, &bad) != RT_OK)
        return rt_check_add(&d->checks, err, RT_CHECK_FAIL, name, "%s", bad.msg);
    if (rt_template_prompt(m->tmpl, &turn, 1, RT_THINKING_ON, "canary", prompt, &bad) != RT_OK)
        return rt_check_add(&d->checks, err, RT_CHECK_FAIL, name, "%s", bad.msg);
    const size_t n = prompt->enc.n;
    const bool prefix = whole->enc.n >= n && memcmp(whole->enc.ids, prompt->enc.ids, n * sizeof *prompt->enc.ids) == 0;
    RT_TRY(rt_tokenizer_decode(m->tok, whole->enc.ids, whole->enc.n, false, &text, err));
    const uint32_t end_id = rt_template_end_id(m->tmpl);
    if (end_id != UINT32_MAX && rt_tokenizer_bytes(m->tok, end_id, &end, &end_len) && ends_with(&text, end, end_len))
        text.len -= end_len;
    const char *thought = strstr(COMPLETION, THOUGHT);
    if (!prefix)
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_FAIL, name, "prompt and completion are rendered otherwise than a prompt for generation: a student would be "
                            "trained on text that it never meets"));
    else if (!ends_with(&text, thought, strlen(thought)))
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_FAIL, name, "the text behind the prompt is not the completion"));
    else
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_PASS, name, "prompt and completion are the prompt for generation and the completion behind it"));
out:
    rt_buf_free(&text);
    return st;
}

static enum rt_status canaries(struct rt_doctor *d, const char *who, const char *dir, const struct rt_model_dir *m, struct rt_err *err)
{
    enum rt_status st;
    struct rt_rendered whole = {0}, prompt = {0};
    struct rt_template *t = NULL;
    struct rt_err bad = {0};
    char name[40];
    if (m->tok == NULL)
        return RT_OK;
    snprintf(name, sizeof name, "%s.template", who);
    if (m->tmpl == NULL) {
        if (rt_template_load(dir, NULL, m->tok, &t, &bad) == RT_OK)
            st = rt_check_add(&d->checks, err, RT_CHECK_WARN, name, "the directory has no chat template: prompt and messages lines need --template");
        else
            st = rt_check_add(&d->checks, err, RT_CHECK_FAIL, name, "%s", bad.msg);
        rt_template_free(t);
        return st;
    }
    RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_PASS, name, "recognised as %s", rt_template_name(m->tmpl)));
    RT_TRY(check_whole(d, who, m, &whole, err));
    RT_TRY(check_generation(d, who, m, &whole, &prompt, err));
out:
    rt_rendered_free(&whole);
    rt_rendered_free(&prompt);
    return st;
}

/* ---- both ---- */
static enum rt_status pair(struct rt_doctor *d, struct rt_err *err)
{
    const char *a = d->tm.tok != NULL ? rt_tokenizer_sha256(d->tm.tok) : "", *b = d->sm.tok != NULL ? rt_tokenizer_sha256(d->sm.tok) : "";
    if (!d->have_teacher || !d->have_student)
        return RT_OK;
    if (a[0] == '\0' || b[0] == '\0')
        return rt_check_add(&d->checks, err, RT_CHECK_WARN, "pair.tokenizer", "cannot be compared: %s has no tokenizer", a[0] == '\0' ? "the teacher" : "the student");
    if (strcmp(a, b) != 0)
        return rt_check_add(&d->checks, err, RT_CHECK_WARN, "pair.tokenizer", "teacher (%.12s) and student (%.12s) have different tokenizers: traces can be used as they "
                            "are, soft labels and states cannot; rewrite shards with `retort retarget --student` first", a, b);
    if (d->tc.vocab_size > d->sc.vocab_size)
        return rt_check_add(&d->checks, err, RT_CHECK_PASS, "pair.tokenizer", "the same: soft labels can be used directly; the head has %" PRId64
                            " rows in the teacher, %" PRId64 " in the student, ids that exist fit both", d->tc.vocab_size, d->sc.vocab_size);
    return rt_check_add(&d->checks, err, RT_CHECK_PASS, "pair.tokenizer", "the same: soft labels can be used directly");
}

enum rt_status rt_doctor_models(struct rt_doctor *d, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (d->teacher != NULL) {
        RT_TRY(open_teacher(d, err));
        RT_TRY(canaries(d, "teacher", d->teacher, &d->tm, err));
    }
    if (d->student != NULL) {
        RT_TRY(open_student(d, err));
        RT_TRY(canaries(d, "student", d->student_dir, &d->sm, err));
    }
    RT_TRY(pair(d, err));
out:
    return st;
}
