#include "distill/retarget_vocab.h"

#include <string.h>

#include "core/mem.h"
#include "formats/unicode.h"

void rt_vocab_map_free(struct rt_vocab_map *m)
{
    rt_free(m->at);
    rt_free(m->first);
    rt_free(m->equal);
    rt_free(m->opaque);
    rt_free(m->blank);
    rt_free(m->digits);
    *m = (struct rt_vocab_map){0};
}

static uint32_t end_of(const struct rt_model_dir *m)
{
    const uint32_t end = m->tmpl != NULL ? rt_template_end_id(m->tmpl) : UINT32_MAX;
    const int64_t eos = rt_tokenizer_eos(m->tok);
    return end != UINT32_MAX ? end : eos >= 0 ? (uint32_t)eos : RT_NO_ID;
}

static bool is_think_tag(const char *bytes, size_t len)
{
    return (len == 7 && memcmp(bytes, "<think>", 7) == 0) || (len == 8 && memcmp(bytes, "</think>", 8) == 0);
}

/* The student's token of the same bytes: an added token for an added one. */
static uint32_t same_bytes(const struct rt_vocab_map *m, uint32_t w, const char *bytes, size_t len)
{
    uint32_t id;
    if (m->same)
        return w;
    if (!rt_tokenizer_find(m->student, bytes, len, &id))
        return RT_NO_ID;
    return rt_tokenizer_is_added(m->teacher, w) && !rt_tokenizer_is_added(m->student, id) ? RT_NO_ID : id;
}

static void put_role(struct rt_vocab_map *m, int64_t teacher, int64_t student)
{
    if (teacher >= 0 && teacher < m->n_teacher && student >= 0 && student < m->n_student && m->opaque[teacher] && m->equal[teacher] == RT_NO_ID)
        m->equal[teacher] = (uint32_t)student;
}

/* equal, opaque, and the sizes that make `at`. */
static void classify(struct rt_vocab_map *m, const struct rt_model_dir *teacher, const struct rt_model_dir *student)
{
    for (uint32_t w = 0; w < m->n_teacher; w++) {
        const char *bytes = "";
        size_t len = 0;
        m->equal[w] = RT_NO_ID;
        m->at[w + 1] = 0;
        if (!rt_tokenizer_bytes(m->teacher, w, &bytes, &len))
            continue;
        m->equal[w] = same_bytes(m, w, bytes, len);
        m->opaque[w] = rt_tokenizer_is_added(m->teacher, w) && !(is_think_tag(bytes, len) && m->equal[w] == RT_NO_ID);
        m->at[w + 1] = m->opaque[w] || len == 0 ? 1 : (uint32_t)len;
    }
    if (m->teacher_end != RT_NO_ID && m->teacher_end < m->n_teacher) {
        m->equal[m->teacher_end] = m->student_end;
        m->opaque[m->teacher_end] = 1;
        m->at[m->teacher_end + 1] = 1;
    }
    const int64_t eos = rt_tokenizer_eos(student->tok);
    put_role(m, rt_tokenizer_eos(teacher->tok), eos >= 0 ? eos : (int64_t)m->student_end);
    put_role(m, rt_tokenizer_bos(teacher->tok), rt_tokenizer_bos(student->tok));
    put_role(m, rt_tokenizer_pad(teacher->tok), rt_tokenizer_pad(student->tok));
    m->at[0] = 0;
    for (uint32_t w = 0; w < m->n_teacher; w++)
        m->at[w + 1] += m->at[w];
}

static bool begins_with(const struct rt_vocab_map *m, uint32_t id, const char *s, size_t len)
{
    const char *bytes;
    size_t n;
    return rt_tokenizer_bytes(m->student, id, &bytes, &n) && n > 0 && n <= len && memcmp(bytes, s, n) == 0;
}

/* The student's first token of s: of the text as it is encoded, or, where s is no UTF-8 or is normalised to other bytes, of
 * one word of these bytes. */
static enum rt_status first_token(const struct rt_vocab_map *m, struct rt_tokenizer *student, const char *s, size_t len, struct rt_encoding *e,
                                  uint32_t *id, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    e->n = 0;
    if (rt_utf8_prefix(s, len) == len)
        RT_TRY(rt_tokenizer_encode(student, s, len, e, err));
    if (e->n == 0 || !begins_with(m, e->ids[0], s, len)) {
        e->n = 0;
        RT_TRY(rt_tokenizer_encode_word(student, s, len, e, err));
    }
    *id = e->n > 0 ? e->ids[0] : RT_NO_ID;
out:
    return st;
}

static enum rt_status fill_first(struct rt_vocab_map *m, struct rt_tokenizer *student, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_encoding e = {0};
    for (uint32_t w = 0; w < m->n_teacher; w++) {
        const uint32_t at = m->at[w], n = m->at[w + 1] - at;
        const char *bytes = "";
        size_t len = 0;
        for (uint32_t o = 0; o < n; o++)
            m->first[at + o] = RT_NO_ID;
        if (n == 0 || !rt_tokenizer_bytes(m->teacher, w, &bytes, &len))
            continue;
        if (m->opaque[w] || m->same) {
            m->first[at] = m->equal[w];
            continue;
        }
        for (uint32_t o = 0; o < n && o < len; o++)
            RT_TRY(first_token(m, student, bytes + o, len - o, &e, &m->first[at + o], err));
    }
out:
    rt_encoding_free(&e);
    return st;
}

static void classify_student(struct rt_vocab_map *m)
{
    for (uint32_t u = 0; u < m->n_student; u++) {
        const char *bytes;
        size_t len, n;
        if (!rt_tokenizer_bytes(m->student, u, &bytes, &len) || len == 0 || rt_tokenizer_is_added(m->student, u))
            continue;
        bool blank = rt_utf8_prefix(bytes, len) == len, digits = true;
        for (size_t i = 0; blank && i < len; i += n)
            blank = rt_is_space(rt_utf8_next(bytes + i, len - i, &n));
        for (size_t i = 0; digits && i < len; i++)
            digits = bytes[i] >= '0' && bytes[i] <= '9';
        m->blank[u] = blank;
        m->digits[u] = digits;
    }
}

enum rt_status rt_vocab_map_create(const struct rt_model_dir *teacher, struct rt_model_dir *student, struct rt_vocab_map *out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_vocab_map m = {.teacher = teacher->tok, .student = student->tok, .n_teacher = rt_tokenizer_n_ids(teacher->tok),
                             .n_student = rt_tokenizer_n_ids(student->tok), .teacher_end = end_of(teacher), .student_end = end_of(student)};
    m.same = strcmp(rt_tokenizer_sha256(m.teacher), rt_tokenizer_sha256(m.student)) == 0;
    RT_TRY(rt_alloc((size_t)m.n_teacher + 1, sizeof *m.at, "a map of vocabularies", &m.at, err));
    RT_TRY(rt_alloc(m.n_teacher, sizeof *m.equal, "a map of vocabularies", &m.equal, err));
    RT_TRY(rt_alloc(m.n_teacher, 1, "a map of vocabularies", &m.opaque, err));
    RT_TRY(rt_alloc(m.n_student, 1, "a map of vocabularies", &m.blank, err));
    RT_TRY(rt_alloc(m.n_student, 1, "a map of vocabularies", &m.digits, err));
    classify(&m, teacher, student);
    RT_TRY(rt_alloc(m.at[m.n_teacher], sizeof *m.first, "a map of vocabularies", &m.first, err));
    RT_TRY(fill_first(&m, student->tok, err));
    classify_student(&m);
    *out = m;
    m = (struct rt_vocab_map){0};
out:
    rt_vocab_map_free(&m);
    return st;
}
