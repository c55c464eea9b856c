/* Fuzz target: sequences of any tokens and masks through retargeting; what comes out holds every rule of rows. */
#include <math.h>
#include <string.h>

#include "tests/fuzz.h"
#include "tests/retarget_fixture.h"

enum { STUDENTS = 3, TOKENS = 48, K = 8 };

static struct rt_model_dir teacher, student[STUDENTS];
static struct rt_vocab_map map[STUDENTS];

static void retarget_begin(struct fuzz_seeds *s)
{
    static const char *const dirs[STUDENTS] = {"tests/data/tokenizers/qwen", "tests/data/tokenizers/llama3", "tests/data/tokenizers/smollm2"};
    static const char *const seeds[] = {"\x01\x01" "the answer is 42 </think> \\boxed{201}\r\n", "\x12\x05" "\xf0\x9f\x98\x80\xe5\xad\xa6\xe4\xb9\xa0  na\xc3\xafve",
                                        "\x21\x04" "abc 12 the answer", "\x11\x07" "(\0)\0002\0<\0P\0Q"};
    struct rt_err err = {0};
    fuzz_dir("fuzz-retarget");
    fuzz_must(rt_model_dir_open("tests/data/tokenizers/deepseek", NULL, NULL, &teacher, &err), &err);
    for (int i = 0; i < STUDENTS; i++) {
        fuzz_must(rt_model_dir_open(dirs[i], NULL, NULL, &student[i], &err), &err);
        fuzz_must(rt_vocab_map_create(&teacher, &student[i], &map[i], &err), &err);
    }
    for (size_t i = 0; i < sizeof seeds / sizeof seeds[0]; i++)
        fuzz_seed(s, seeds[i], i == 3 ? 12 : strlen(seeds[i]));
}

static void retarget_end(void)
{
    for (int i = 0; i < STUDENTS; i++) {
        rt_vocab_map_free(&map[i]);
        rt_model_dir_close(&student[i]);
    }
    rt_model_dir_close(&teacher);
}

/* Tokens of the input: any ids, or those of its text; behind the prompt of a conversation, or alone. */
static enum rt_status tokens_of(const uint8_t *data, size_t n, uint8_t how, struct rt_rendered *r, size_t *first, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_message m = {.role = "user", .content = "hi", .content_len = 2, .loss = -1};
    const char *bytes;
    size_t len;
    *first = 0;
    if (how & 1) {
        RT_TRY(rt_template_completion(teacher.tmpl, &m, 1, "", 0, "fuzz", r, err));
        r->enc.n = *first = r->target_start;
    }
    if (how & 2) {
        for (size_t i = 0; i + 1 < n && r->enc.n < TOKENS; i += 2) {
            const uint32_t id = (data[i] | (uint32_t)data[i + 1] << 8) % rt_tokenizer_n_ids(teacher.tok);
            if (rt_tokenizer_bytes(teacher.tok, id, &bytes, &len))
                RT_TRY(rt_encoding_push(&r->enc, teacher.tok, id, err));
        }
    } else {
        RT_TRY(rt_tokenizer_encode(teacher.tok, (const char *)data, n, &r->enc, err));
        r->enc.n = r->enc.n < TOKENS ? r->enc.n : TOKENS;
    }
    if (how & 4)
        RT_TRY(rt_encoding_push(&r->enc, teacher.tok, rt_template_end_id(teacher.tmpl), err));
out:
    return st;
}

static void check(const struct rf_rows *r, const struct rt_vocab_map *m, const struct rt_retarget_text *t, const struct rt_rows *rows,
                  const struct rt_row_identity *id, const struct rt_retarget_counts *c)
{
    struct rt_err err = {0};
    int64_t masked = 0;
    if (rt_rows_check(rows, id, "made", &err) != RT_OK)
        fuzz_fail("%s", err.msg);
    for (int i = 0; i < RT_MASK_COUNT; i++)
        masked += c->masked[i];
    const bool spans = rt_row_identity_spans(id); /* no distributions; a row counts where it lies in a span */
    int64_t counted = 0;
    for (int k = 0; k < RT_PLACE_KINDS; k++)
        counted += c->rows[k];
    if (masked + counted != c->targets || (!spans && counted != rows->n_rows))
        fuzz_fail("%ld targets, %ld rows, %ld of them counted, %ld masked", (long)c->targets, (long)rows->n_rows, (long)counted, (long)masked);
    for (int k = 0; k < RT_PLACE_KINDS && !spans; k++)
        if (fabs(c->mass[k] + c->residual[k] - (double)c->rows[k]) > 1e-6 * (double)(c->rows[k] + 1))
            fuzz_fail("mass %g and residual %g of %ld rows", c->mass[k], c->residual[k], (long)c->rows[k]);
    if (t->student.n > 0 && t->teacher.n > r->rows.n_tokens)
        fuzz_fail("more teacher tokens than there are");
    if (m->n_student != id->n_ids)
        fuzz_fail("ids of another student");
}

static enum rt_status retarget_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_rendered rendered = {0};
    struct rf_rows r = {0};
    struct rt_retarget_text text = {0};
    struct rt_retarget_out out = {0};
    struct rt_retarget_counts counts = {0};
    struct rt_place place[4 * 1024];
    struct rt_rows rows;
    struct rt_row_identity id;
    uint8_t mask[TOKENS + 64] = {0};
    enum rt_reject reject;
    size_t first;
    if (n < 3)
        return rt_fail(err, RT_FORMAT, "too short");
    const int which = data[0] % STUDENTS, mode = (data[0] >> 4) % RT_RETARGET_MODES;
    RT_TRY(tokens_of(data + 2, n - 2, data[1], &rendered, &first, err));
    if (rendered.enc.n < 2 || rendered.enc.n > sizeof mask)
        RT_FAIL(err, FORMAT, "%zu tokens", rendered.enc.n);
    for (size_t i = first; i < rendered.enc.n; i++)
        mask[i] = data[1] & 8 ? data[2 + i % (n - 2)] & 1 : 1;
    r = rf_rows(&teacher, rendered.enc.ids, mask, (int64_t)rendered.enc.n, K, rf_hash_logit, NULL);
    const struct rt_retarget_pair pair = {&teacher, &student[which], &map[which]};
    RT_TRY(rt_retarget_text_make(&pair, &r.rows, &text, &reject, err));
    if (reject != RT_REJECT_NONE)
        RT_FAIL(err, FORMAT, "rejected for %d", (int)reject);
    if (text.student.n > (int64_t)(sizeof place / sizeof place[0]))
        RT_FAIL(err, FORMAT, "too long");
    rt_align(&text.teacher, &text.student, place);
    const struct rt_retarget_in in = {.map = &map[which], .id = &r.id, .rows = &r.rows, .teacher = text.teacher, .student = text.student, .place = place,
                                      .text = text.text.data, .text_len = (int64_t)text.text.len, .byte_end = text.enc.byte_end};
    RT_TRY(rt_retarget_rows(&in, (enum rt_retarget_mode)mode, &out, &rows, &counts, err));
    rt_retarget_identity(&r.id, &student[which], map[which].n_student, (enum rt_retarget_mode)mode, false, &id);
    check(&r, &map[which], &text, &rows, &id, &counts);
out:
    rf_rows_free(&r);
    rt_rendered_free(&rendered);
    rt_retarget_text_free(&text);
    rt_retarget_out_free(&out);
    return st;
}

const struct fuzz_target fuzz_retarget = {"retarget", 1500, NULL, 1 << 20, retarget_begin, NULL, retarget_run, retarget_end};
