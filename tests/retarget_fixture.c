#include "tests/retarget_fixture.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "core/mem.h"

/* The printable character that stands for a byte in tokenizer.json (GPT-2's table). */
static void put_byte(struct rt_buf *b, uint8_t byte)
{
    struct rt_err err = {0};
    unsigned c = byte, n = 0;
    if (!((byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174)) {
        for (unsigned i = 0; i < byte; i++)
            n += !((i >= 33 && i <= 126) || (i >= 161 && i <= 172) || i >= 174);
        c = 256 + n;
    }
    if (c == '"' || c == '\\')
        assert_ok(rt_buf_printf(b, &err, "\\%c", (char)c));
    else if (c < 128)
        assert_ok(rt_buf_printf(b, &err, "%c", (char)c));
    else
        assert_ok(rt_buf_printf(b, &err, "%c%c", (char)(0xc0 | c >> 6), (char)(0x80 | (c & 63))));
}

static void put_word(struct rt_buf *b, const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        put_byte(b, (uint8_t)s[i]);
}

static void put_file(const char *dir, const char *name, const struct rt_buf *b)
{
    struct rt_err err = {0};
    char path[4096];
    assert_ok(rt_path_join(path, sizeof path, dir, name, &err));
    assert_ok(rt_publish_bytes(path, b->data, b->len, &err));
}

const char *rf_tokenizer(const char *name, const char *const *merges, int n_merges, bool nfc)
{
    struct rt_err err = {0};
    struct rt_buf b = {0};
    char left[64], right[64];
    const char *dir = test_tmp(name);
    assert_ok(rt_mkdirs(dir, &err));
    assert_ok(rt_buf_printf(&b, &err, "{\"decoder\":{\"type\":\"ByteLevel\"},\"normalizer\":%s,\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":"
                            "\"[\\\\s\\\\S]+\"},\"behavior\":\"Isolated\",\"invert\":false},{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,"
                            "\"use_regex\":false}]},\"added_tokens\":[{\"id\":%d,\"content\":\"<end>\",\"special\":true,\"normalized\":false,\"lstrip\":false,"
                            "\"rstrip\":false,\"single_word\":false}],\"model\":{\"type\":\"BPE\",\"vocab\":{", nfc ? "{\"type\":\"NFC\"}" : "null", 256 + n_merges));
    for (int i = 0; i < 256; i++) {
        assert_ok(rt_buf_puts(&b, i > 0 ? ",\"" : "\"", &err));
        put_byte(&b, (uint8_t)i);
        assert_ok(rt_buf_printf(&b, &err, "\":%d", i));
    }
    for (int i = 0; i < n_merges; i++) {
        assert_int_equal(sscanf(merges[i], "%63s %63s", left, right), 2);
        assert_ok(rt_buf_puts(&b, ",\"", &err));
        put_word(&b, left, strlen(left));
        put_word(&b, right, strlen(right));
        assert_ok(rt_buf_printf(&b, &err, "\":%d", 256 + i));
    }
    assert_ok(rt_buf_puts(&b, "},\"merges\":[", &err));
    for (int i = 0; i < n_merges; i++) {
        sscanf(merges[i], "%63s %63s", left, right);
        assert_ok(rt_buf_puts(&b, i > 0 ? ",\"" : "\"", &err));
        put_word(&b, left, strlen(left));
        assert_ok(rt_buf_puts(&b, " ", &err));
        put_word(&b, right, strlen(right));
        assert_ok(rt_buf_puts(&b, "\"", &err));
    }
    assert_ok(rt_buf_puts(&b, "]}}", &err));
    put_file(dir, "tokenizer.json", &b);
    b.len = 0;
    assert_ok(rt_buf_puts(&b, "{\"eos_token\":\"<end>\",\"add_bos_token\":false}", &err));
    put_file(dir, "tokenizer_config.json", &b);
    rt_buf_free(&b);
    return dir;
}

struct rt_model_dir rf_model(const char *dir)
{
    struct rt_err err = {0};
    struct rt_model_dir m;
    assert_ok(rt_model_dir_open(dir, NULL, NULL, &m, &err));
    return m;
}

double rf_hash_logit(const void *ctx, int64_t i, uint32_t prev, uint32_t w, uint32_t next)
{
    uint64_t x = (uint64_t)i * 0x9e3779b97f4a7c15u + (uint64_t)prev * 0xbf58476d1ce4e5b9u + (uint64_t)w * 0x94d049bb133111ebu + 1;
    (void)ctx;
    for (int r = 0; r < 3; r++) {
        x ^= x >> 31;
        x *= 0xd6e8feb86659fd93u;
    }
    return 3 * ((double)(x >> 11) / 9007199254740992.0 - 0.5) + (w == next ? 5 : 0);
}

struct entry {
    float logit;
    uint32_t id;
};

static int descending(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    return x->logit != y->logit ? (x->logit < y->logit) - (x->logit > y->logit) : (x->id > y->id) - (x->id < y->id);
}

static void *grow(struct rt_buf *b, size_t bytes)
{
    char *at = b->data + b->len;
    b->len += (bytes + 7) / 8 * 8;
    assert_true(b->len <= b->cap);
    return at;
}

static void fill_row(const struct rt_model_dir *teacher, struct rt_rows *rows, int64_t row, int64_t i, rf_logit *logit, const void *ctx, struct entry *e)
{
    const uint32_t n_ids = rt_tokenizer_n_ids(teacher->tok);
    const char *bytes;
    size_t len;
    uint32_t n = 0, rank = 0;
    double sum[2] = {0, 0};
    const uint32_t next = rows->ids[i + 1];
    for (uint32_t w = 0; w < n_ids; w++) {
        const bool there = rt_tokenizer_bytes(teacher->tok, w, &bytes, &len);
        e[n++] = (struct entry){there ? (float)logit(ctx, i, rows->ids[i], w, next) : -90.0f, w};
        sum[0] += exp((double)e[n - 1].logit);
        sum[1] += exp((double)e[n - 1].logit / 2);
    }
    qsort(e, n, sizeof *e, descending);
    while (e[rank].id != next)
        rank++;
    float *lse = (float *)(uintptr_t)rows->lse + 2 * row;
    lse[0] = (float)log(sum[0]);
    lse[1] = (float)log(sum[1]);
    for (int j = 0; j < rows->k; j++) {
        ((uint32_t *)(uintptr_t)rows->topk_ids)[row * rows->k + j] = e[j].id;
        ((float *)(uintptr_t)rows->topk_logits)[row * rows->k + j] = e[j].logit;
    }
    ((uint32_t *)(uintptr_t)rows->position)[row] = (uint32_t)i;
    ((uint32_t *)(uintptr_t)rows->next_id)[row] = next;
    ((uint32_t *)(uintptr_t)rows->next_rank)[row] = rank;
    ((float *)(uintptr_t)rows->next_logprob)[row] = e[rank].logit - lse[0];
}

struct rf_rows rf_rows(const struct rt_model_dir *teacher, const uint32_t *ids, const uint8_t *mask, int64_t n, int k, rf_logit *logit, const void *ctx)
{
    struct rt_err err = {0};
    struct rf_rows r = {.id = {.teacher_layers = 3, .n_lse = 2, .lse_temperature = {1, 2}, .completion_only = true}};
    struct rt_buf text = {0};
    struct entry *e;
    const uint32_t n_ids = rt_tokenizer_n_ids(teacher->tok);
    k = k < (int)n_ids ? k : (int)n_ids;
    r.id.vocab_size = r.id.n_ids = n_ids;
    r.id.top_k = k;
    strcpy(r.id.teacher_sha256, "toy");
    strcpy(r.id.mode, "toy");
    strcpy(r.id.tokenizer_sha256, rt_tokenizer_sha256(teacher->tok));
    strcpy(r.id.template_sha256, teacher->tmpl != NULL ? rt_template_sha256(teacher->tmpl) : "");
    assert_ok(rt_tokenizer_decode(teacher->tok, ids, (size_t)n, false, &text, &err));
    assert_ok(rt_buf_reserve(&r.bytes, text.len + (size_t)n * (40 + 8 * (size_t)k) + 512, &err));
    assert_ok(rt_alloc(n_ids, sizeof *e, "logits", &e, &err));
    struct rt_rows *rows = &r.rows;
    *rows = (struct rt_rows){.source_line = 7, .n_tokens = n, .k = k, .n_lse = 2, .text_len = (int64_t)text.len};
    rows->ids = memcpy(grow(&r.bytes, (size_t)n * 4), ids, (size_t)n * 4);
    rows->loss_mask = memcpy(grow(&r.bytes, (size_t)n), mask, (size_t)n);
    rows->text = memcpy(grow(&r.bytes, text.len), text.len > 0 ? text.data : "", text.len);
    uint32_t *end = grow(&r.bytes, (size_t)n * 4);
    assert_ok(rt_tokenizer_byte_ends(teacher->tok, ids, (size_t)n, end, &err));
    rows->byte_end = end;
    rows->position = grow(&r.bytes, (size_t)n * 4);
    rows->topk_ids = grow(&r.bytes, (size_t)n * (size_t)k * 4);
    rows->topk_logits = grow(&r.bytes, (size_t)n * (size_t)k * 4);
    rows->lse = grow(&r.bytes, (size_t)n * 8);
    rows->next_id = grow(&r.bytes, (size_t)n * 4);
    rows->next_rank = grow(&r.bytes, (size_t)n * 4);
    rows->next_logprob = grow(&r.bytes, (size_t)n * 4);
    for (int64_t i = 0; i + 1 < n; i++)
        if (mask[i + 1] != 0)
            fill_row(teacher, rows, rows->n_rows++, i, logit, ctx, e);
    rt_rows_key(ids, n, rows->key);
    assert_ok(rt_rows_check(rows, &r.id, "toy", &err));
    rt_buf_free(&text);
    rt_free(e);
    return r;
}

void rf_rows_free(struct rf_rows *r)
{
    rt_buf_free(&r->bytes);
    *r = (struct rf_rows){0};
}

struct rf_rows rf_render(const struct rt_model_dir *teacher, const char *prompt, const char *completion, int k)
{
    struct rt_err err = {0};
    struct rt_rendered r = {0};
    struct rf_rows out;
    if (completion != NULL) {
        const struct rt_message m = {.role = "user", .content = prompt, .content_len = strlen(prompt), .loss = -1};
        assert_ok(rt_template_completion(teacher->tmpl, &m, 1, completion, strlen(completion), "test", &r, &err));
        out = rf_rows(teacher, r.enc.ids, r.loss_mask, (int64_t)r.enc.n, k, rf_hash_logit, NULL);
    } else {
        uint8_t mask[4096];
        memset(mask, 1, sizeof mask);
        if (rt_tokenizer_add_bos(teacher->tok))
            assert_ok(rt_encoding_push(&r.enc, teacher->tok, (uint32_t)rt_tokenizer_bos(teacher->tok), &err));
        assert_ok(rt_tokenizer_encode(teacher->tok, prompt, strlen(prompt), &r.enc, &err));
        assert_true(r.enc.n < sizeof mask);
        out = rf_rows(teacher, r.enc.ids, mask, (int64_t)r.enc.n, k, rf_hash_logit, NULL);
    }
    rt_rendered_free(&r);
    return out;
}

struct rf_made rf_make(struct rt_model_dir *teacher, struct rt_model_dir *student, const struct rf_rows *r, enum rt_retarget_mode mode)
{
    struct rt_err err = {0};
    struct rf_made m = {0};
    assert_ok(rt_vocab_map_create(teacher, student, &m.map, &err));
    assert_ok(rt_retarget_counts_init(&m.counts, m.map.n_student, &err));
    const struct rt_retarget_pair pair = {teacher, student, &m.map};
    assert_ok(rt_retarget_text_make(&pair, &r->rows, &m.text, &m.reject, &err));
    if (m.reject != RT_REJECT_NONE)
        return m;
    assert_ok(rt_alloc((size_t)m.text.student.n, sizeof *m.place, "places", &m.place, &err));
    rt_align(&m.text.teacher, &m.text.student, m.place);
    const struct rt_retarget_in in = {.map = &m.map, .id = &r->id, .rows = &r->rows, .teacher = m.text.teacher, .student = m.text.student, .place = m.place,
                                      .text = m.text.text.data, .text_len = (int64_t)m.text.text.len, .byte_end = m.text.enc.byte_end};
    assert_ok(rt_retarget_rows(&in, mode, &m.out, &m.rows, &m.counts, &err));
    rt_retarget_identity(&r->id, student, rt_tokenizer_n_ids(student->tok) + 3, mode, false, &m.id);
    assert_ok(rt_rows_check(&m.rows, &m.id, "retargeted", &err));
    return m;
}

void rf_made_free(struct rf_made *m)
{
    rt_vocab_map_free(&m->map);
    rt_retarget_text_free(&m->text);
    rt_retarget_out_free(&m->out);
    rt_retarget_counts_free(&m->counts);
    rt_free(m->place);
    *m = (struct rf_made){0};
}

int64_t rf_row_of(const struct rf_made *m, int64_t i)
{
    for (int64_t r = 0; r < m->rows.n_rows; r++)
        if ((int64_t)m->rows.position[r] + 1 == i)
            return r;
    return -1;
}

double rf_prob(const struct rf_made *m, int64_t row, uint32_t id)
{
    for (int j = 0; j < m->rows.k; j++)
        if (m->rows.topk_ids[row * m->rows.k + j] == id)
            return exp((double)m->rows.topk_logits[row * m->rows.k + j] - (double)m->rows.lse[row * m->rows.n_lse]);
    return 0;
}

const char *rf_token(const struct rf_made *m, int64_t i)
{
    static char ring[8][64];
    static int at;
    const char *bytes = "";
    size_t n = 0;
    char *out = ring[at++ % 8];
    rt_tokenizer_bytes(m->map.student, m->text.enc.ids[i], &bytes, &n);
    snprintf(out, sizeof ring[0], "%.*s", (int)n, bytes);
    return out;
}

int64_t rf_find(const struct rf_made *m, const char *text, int64_t from)
{
    for (int64_t i = from; i < m->text.student.n; i++)
        if (strcmp(rf_token(m, i), text) == 0)
            return i;
    fail_msg("no student token '%s'", text);
    return -1;
}

int64_t rf_targets_of(const struct rf_made *m, char *out, size_t cap)
{
    int64_t n = 0;
    out[0] = '\0';
    for (int64_t i = 1; i < m->rows.n_tokens; i++) {
        if (m->rows.loss_mask[i] == 0)
            continue;
        n++;
        if (m->rows.ids[i] != m->map.student_end)
            strncat(out, rf_token(m, i), cap - strlen(out) - 1);
    }
    return n;
}

void rf_done(struct rf_both *b)
{
    rf_made_free(&b->m);
    rf_rows_free(&b->r);
    rt_model_dir_close(&b->t);
    rt_model_dir_close(&b->s);
}
