/* The student's side of a text: alignment, special tokens, bytes that tokens split, and what is rejected. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "tests/retarget_fixture.h"

/* ---- alignment ---- */
static void places_by_units(void **state)
{
    (void)state;
    /* teacher  |ab|cde||f|gh|   student |a|b|cd|ef|g|h|  and one more that the teacher lacks */
    const uint32_t t[] = {2, 5, 5, 6, 8}, s[] = {1, 2, 4, 6, 7, 8, 9};
    const uint8_t target[] = {1, 1, 1, 1, 1, 1, 1};
    const struct rt_side teacher = {.end = t, .n = 5}, student = {.end = s, .n = 7, .target = target};
    struct rt_place p[7];
    rt_align(&teacher, &student, p);
    static const struct { enum rt_place_kind kind; int64_t teacher, last; uint32_t offset; int ends; } want[7] = {
        {RT_PLACE_HEAD, 0, 0, 0, 0},   {RT_PLACE_INSIDE, 0, 0, 1, 1}, {RT_PLACE_HEAD, 1, 1, 0, 0},  {RT_PLACE_CROSSING, 1, 3, 2, 1},
        {RT_PLACE_HEAD, 4, 4, 0, 0},   {RT_PLACE_INSIDE, 4, 4, 1, 1}, {RT_PLACE_NONE, -1, -1, 0, 0},
    };
    for (int i = 0; i < 7; i++) {
        assert_int_equal(p[i].kind, want[i].kind);
        assert_int_equal(p[i].teacher, want[i].teacher);
        assert_int_equal(p[i].last, want[i].last);
        assert_int_equal(p[i].offset, want[i].offset);
        assert_int_equal(p[i].ends, want[i].ends);
    }
}

static void places_with_offsets_and_masks(void **state)
{
    (void)state;
    const uint32_t t[] = {99, 6, 8, 9}, s[] = {99, 99, 2, 4, 6, 8, 9}; /* the teacher begins at unit 4, the student at 0 */
    const uint8_t t_target[] = {0, 1, 0, 1}, s_target[] = {0, 0, 1, 1, 1, 1, 0};
    const struct rt_side teacher = {.end = t, .first = 1, .n = 4, .begin = 4, .target = t_target},
                         student = {.end = s, .first = 2, .n = 7, .begin = 0, .target = s_target};
    struct rt_place p[7];
    rt_align(&teacher, &student, p);
    const enum rt_place_kind want[7] = {RT_PLACE_NONE, RT_PLACE_NONE, RT_PLACE_NONE, RT_PLACE_NONE, RT_PLACE_WHOLE, RT_PLACE_NONE, RT_PLACE_NONE};
    for (int i = 0; i < 7; i++)
        assert_int_equal(p[i].kind, want[i]);
}

/* ---- conversations ---- */

static void retarget(struct rf_both *b, const char *teacher, const char *student, const char *prompt, const char *completion)
{
    b->t = rf_model(test_data(teacher));
    b->s = rf_model(test_data(student));
    b->r = rf_render(&b->t, prompt, completion, 24);
    b->m = rf_make(&b->t, &b->s, &b->r, RT_RETARGET_EXACT);
}

/* The student's own prompt; its completion begins with what the teacher's prompt forced, without rows. */
static void a_thought_in_another_template(void **state)
{
    (void)state;
    struct rf_both b;
    char text[512];
    retarget(&b, DEEPSEEK, LLAMA, "What is x?", "So x = 42.</think>\n\nThe answer is 42");
    assert_int_equal(b.m.reject, RT_REJECT_NONE);
    assert_non_null(strstr(b.m.rows.text, "<|start_header_id|>user<|end_header_id|>\n\nWhat is x?<|eot_id|>"));
    rf_targets_of(&b.m, text, sizeof text);
    assert_string_equal(text, "<think>\nSo x = 42.</think>\n\nThe answer is 42");
    int64_t forced = 0;
    for (int64_t i = b.m.text.student.first; i < b.m.text.student.n && b.m.text.student.end[i] <= 8; i++, forced++)
        assert_int_equal(rf_row_of(&b.m, i), -1);
    assert_true(forced > 1);
    assert_true(b.m.counts.masked[RT_MASK_FORCED] >= forced);
    const int64_t end = b.m.rows.n_tokens - 1; /* the ends of the turn are one another's */
    assert_int_equal(b.m.rows.ids[end], rt_template_end_id(b.s.tmpl));
    assert_int_equal(b.m.place[end].kind, RT_PLACE_WHOLE);
    const int64_t row = rf_row_of(&b.m, end);
    assert_true(row >= 0);
    assert_true(rf_prob(&b.m, row, b.m.rows.ids[end]) > 0.05); /* the toy teacher gives e^5 times more to what comes than to each of 383 others */
    rf_done(&b);
}

/* Both have think tags: one token on either side, with a row. A student without spells them out of ordinary ones. */
static void think_tags(void **state)
{
    (void)state;
    struct rf_both b;
    retarget(&b, DEEPSEEK, QWEN, "Q", "So</think>\n\nThe answer");
    int64_t i = rf_find(&b.m, "</think>", b.m.text.student.first);
    assert_int_equal(b.m.place[i].kind, RT_PLACE_WHOLE);
    assert_true(rf_prob(&b.m, rf_row_of(&b.m, i), b.m.rows.ids[i]) > 0.05);
    rf_done(&b);
    retarget(&b, DEEPSEEK, LLAMA, "Q", "So</think>\n\nThe answer");
    for (i = b.m.text.student.first; b.m.place[i].kind != RT_PLACE_HEAD || strncmp(rf_token(&b.m, i), "<", 1) != 0;)
        i++;
    uint32_t tag;
    assert_true(rt_tokenizer_find(b.t.tok, "</think>", 8, &tag));
    assert_int_equal(b.m.text.teacher.ids[b.m.place[i].teacher], tag);
    assert_int_equal(b.m.map.first[b.m.map.at[tag]], b.m.rows.ids[i]);
    assert_true(rf_prob(&b.m, rf_row_of(&b.m, i), b.m.rows.ids[i]) > 0.05);
    assert_int_equal(b.m.place[i + 1].kind, RT_PLACE_INSIDE);
    rf_done(&b);
}

static void an_empty_completion(void **state)
{
    (void)state;
    struct rf_both b;
    char text[64];
    retarget(&b, DEEPSEEK, QWEN, "Q", "");
    assert_int_equal(b.m.reject, RT_REJECT_NONE);
    const int64_t row = rf_row_of(&b.m, b.m.rows.n_tokens - 1);
    assert_int_equal(b.m.rows.ids[b.m.rows.n_tokens - 1], b.m.map.student_end);
    assert_true(row >= 0);
    assert_true(rf_targets_of(&b.m, text, sizeof text) >= 1);
    assert_int_equal(b.m.rows.n_rows, 1);
    rf_done(&b);
}

/* Bytes that tokens split, in other ways on both sides: every target but the masked ones has a row, and the bytes are the text's. */
static void split_characters_and_spaces(void **state)
{
    (void)state;
    static const char *const texts[] = {"\xf0\x9f\x98\x80\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x92\xbb", "\xe5\xad\xa6\xe4\xb9\xa0 \xe3\x81\x93\xe3\x82\x8c\xe6\x96\x87\xe5\xad\x97",
                                        "a\r\nb\r\n\r\n c", " leading  spaces\tand\n\n\nlines ", "the \\boxed{42} and \\boxed{\\frac{1}{2}}", "na\xc3\xafve \xc3\xa9t\xc3\xa9 201 3 42",
                                        "def f(x):\n    return x\n"};
    static const char *const students[] = {QWEN, LLAMA, SMOLLM};
    for (size_t s = 0; s < sizeof students / sizeof students[0]; s++)
        for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
            struct rf_both b;
            char text[512], want[512];
            retarget(&b, DEEPSEEK, students[s], "Q", texts[i]);
            assert_int_equal(b.m.reject, RT_REJECT_NONE);
            rf_targets_of(&b.m, text, sizeof text);
            snprintf(want, sizeof want, "<think>\n%s", texts[i]);
            assert_int_equal(b.m.rows.text_len, b.m.rows.byte_end[b.m.rows.n_tokens - 1]);
            if (strcmp(text, want) != 0)
                assert_string_equal(text, texts[i]); /* a template of its own forces the opening */
            int64_t masked = 0;
            for (int k = 0; k < RT_MASK_COUNT; k++)
                masked += b.m.counts.masked[k];
            assert_int_equal(b.m.rows.n_rows + masked, b.m.counts.targets);
            assert_true(b.m.rows.n_rows > 3);
            for (int64_t r = 0; r < b.m.rows.n_rows; r++)
                assert_true(rf_prob(&b.m, r, b.m.rows.next_id[r]) > 0); /* what is realised wins its row */
            for (int64_t k = b.m.text.student.first; k < b.m.text.student.n; k++)
                if (b.m.map.blank[b.m.rows.ids[k]])
                    assert_int_equal(rf_row_of(&b.m, k), -1);
            rf_done(&b);
        }
}

/* ---- toy vocabularies: digits, and a token that crosses ---- */
static void toy(struct rf_both *b, const char *const *teacher, int nt, const char *const *student, int ns, const char *text)
{
    struct rt_err err = {0};
    struct rt_encoding e = {0};
    uint8_t mask[64];
    memset(mask, 1, sizeof mask);
    b->t = rf_model(rf_tokenizer("text-teacher", teacher, nt, false));
    b->s = rf_model(rf_tokenizer("text-student", student, ns, false));
    assert_ok(rt_tokenizer_encode(b->t.tok, text, strlen(text), &e, &err));
    b->r = rf_rows(&b->t, e.ids, mask, (int64_t)e.n, 1000, rf_hash_logit, NULL);
    b->m = rf_make(&b->t, &b->s, &b->r, RT_RETARGET_EXACT);
    rt_encoding_free(&e);
}

static void digits_inside_a_number(void **state)
{
    (void)state;
    static const char *const merges[] = {"2 0", "20 1", "2 1", "20 3", "1 7"};
    struct rf_both b;
    toy(&b, merges, 5, NULL, 0, "x=201");
    assert_int_equal(b.m.counts.digits, 3);
    assert_int_equal(b.m.counts.digits_rows, 3);
    assert_int_equal(b.m.place[2].kind, RT_PLACE_HEAD);
    assert_int_equal(b.m.place[3].kind, RT_PLACE_INSIDE);
    assert_int_equal(b.m.place[4].kind, RT_PLACE_INSIDE);
    /* behind "2": the tokens that go on are 20, 201, 203 (to 0) and 21 (to 1); behind "20": 201 and 203 */
    double q[5];
    uint32_t id[5] = {256, 257, 258, 259, 0};
    for (int i = 0; i < 4; i++)
        q[i] = exp(rf_hash_logit(NULL, 1, '=', id[i], 257));
    const int64_t two = rf_row_of(&b.m, 3), three = rf_row_of(&b.m, 4);
    const double all = q[0] + q[1] + q[2] + q[3];
    assert_true(fabs(rf_prob(&b.m, two, '0') - (q[0] + q[1] + q[3]) / all) < 1e-6);
    assert_true(fabs(rf_prob(&b.m, two, '1') - q[2] / all) < 1e-6);
    assert_true(fabs(rf_prob(&b.m, three, '1') - q[1] / (q[1] + q[3])) < 1e-6);
    assert_true(fabs(rf_prob(&b.m, three, '3') - q[3] / (q[1] + q[3])) < 1e-6);
    assert_true(b.m.counts.evidence > 0 && b.m.counts.evidence < 2);
    rf_done(&b);
}

static void a_crossing_token_keeps_its_label(void **state)
{
    (void)state;
    static const char *const t[] = {"b o", "bo x", "e d"}, *const s[] = {"b o", "bo x", "e d", "box ed"};
    struct rf_both b;
    toy(&b, t, 3, s, 4, "a\\boxed{7}");
    const int64_t i = rf_find(&b.m, "boxed", 0);
    assert_int_equal(b.m.place[i].kind, RT_PLACE_CROSSING);
    assert_int_equal(rf_row_of(&b.m, i), -1);
    assert_int_equal(b.m.rows.loss_mask[i], 1);
    assert_int_equal(b.m.counts.masked[RT_MASK_CROSSING], 1);
    assert_int_equal(b.m.counts.crossing[b.m.rows.ids[i]], 1);
    assert_true(rf_row_of(&b.m, i + 1) >= 0); /* and the next one is back on a boundary */
    assert_int_equal(b.m.place[i + 1].kind, RT_PLACE_WHOLE);
    rf_done(&b);
}

/* What follows may change how the student cuts a token: the one that it says there wins what the teacher said, whatever it would say alone. */
static void the_realised_token_wins(void **state)
{
    (void)state;
    static const char *const t[] = {"a b"}, *const s[] = {"b c", "a b"};
    struct rf_both b;
    toy(&b, t, 1, s, 2, "xabc"); /* teacher x ab c, student x a bc; alone, ab is one token of both */
    assert_int_equal(b.m.map.first[b.m.map.at[256]], 257);
    assert_string_equal(rf_token(&b.m, 1), "a");
    assert_int_equal(b.m.place[1].kind, RT_PLACE_HEAD);
    assert_int_equal(b.m.place[2].kind, RT_PLACE_CROSSING);
    double sum = 0;
    for (uint32_t w = 0; w < 258; w++)
        sum += exp(rf_hash_logit(NULL, 0, 'x', w, 256)); /* 256 bytes, ab, <end> */
    const double said = exp(rf_hash_logit(NULL, 0, 'x', 256, 256)), a = exp(rf_hash_logit(NULL, 0, 'x', 'a', 256));
    assert_true(fabs(rf_prob(&b.m, rf_row_of(&b.m, 1), 'a') - (said + a) / sum) < 1e-6);
    assert_true(rf_prob(&b.m, rf_row_of(&b.m, 1), 257) == 0);
    rf_done(&b);
}

/* ---- rejected ---- */
static void not_nfc(void **state)
{
    (void)state;
    struct rf_both b;
    retarget(&b, DEEPSEEK, QWEN, "Q", "caf\x65\xcc\x81 is good"); /* e and a combining accent */
    assert_int_equal(b.m.reject, RT_REJECT_NFC);
    rf_done(&b);
    retarget(&b, DEEPSEEK, LLAMA, "Q", "caf\x65\xcc\x81 is good");
    assert_int_equal(b.m.reject, RT_REJECT_NFC);
    rf_done(&b);
    retarget(&b, DEEPSEEK, QWEN, "Q", "caf\xc3\xa9 is good");
    assert_int_equal(b.m.reject, RT_REJECT_NONE);
    rf_done(&b);
}

static enum rt_reject make_again(struct rf_both *b)
{
    struct rt_err err = {0};
    enum rt_reject reject;
    const struct rt_retarget_pair pair = {&b->t, &b->s, &b->m.map};
    assert_ok(rt_retarget_text_make(&pair, &b->r.rows, &b->m.text, &reject, &err));
    return reject;
}

static void bytes_that_do_not_agree(void **state)
{
    (void)state;
    struct rf_both b;
    retarget(&b, DEEPSEEK, QWEN, "Q", "So x = 42");
    char *text = (char *)(uintptr_t)b.r.rows.text;
    text[b.r.rows.text_len - 60] ^= 1; /* the end token alone is shorter than that */
    assert_int_equal(make_again(&b), RT_REJECT_BYTES);
    text[b.r.rows.text_len - 60] ^= 1;
    assert_int_equal(make_again(&b), RT_REJECT_NONE);
    ((uint32_t *)(uintptr_t)b.r.rows.byte_end)[3]++;
    assert_int_equal(make_again(&b), RT_REJECT_BYTES);
    ((uint32_t *)(uintptr_t)b.r.rows.byte_end)[3]--;
    const char *was = b.r.rows.text;
    b.r.rows.text = NULL;
    assert_int_equal(make_again(&b), RT_REJECT_BYTES);
    b.r.rows.text = was;
    ((uint32_t *)(uintptr_t)b.r.rows.ids)[3] = 100000; /* no such token */
    assert_int_equal(make_again(&b), RT_REJECT_BYTES);
    rf_done(&b);
}

/* A piece of a split text may begin inside a character. */
static void not_utf8(void **state)
{
    (void)state;
    struct rf_both b = {.t = rf_model(test_data(DEEPSEEK)), .s = rf_model(test_data(LLAMA))};
    const uint32_t ids[] = {0x98, 0x80, 'a', 'b'};
    uint32_t real[4];
    const uint8_t mask[] = {1, 1, 1, 1};
    for (int i = 0; i < 4; i++) {
        const char byte = (char)ids[i];
        assert_true(rt_tokenizer_find(b.t.tok, &byte, 1, &real[i]));
    }
    b.r = rf_rows(&b.t, real, mask, 4, 8, rf_hash_logit, NULL);
    b.m = rf_make(&b.t, &b.s, &b.r, RT_RETARGET_EXACT);
    assert_int_equal(b.m.reject, RT_REJECT_UTF8);
    rf_done(&b);
}

/* A masked text whose beginning no template renders. */
static void an_unknown_prompt(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rf_both b = {.t = rf_model(test_data(DEEPSEEK)), .s = rf_model(test_data(QWEN))};
    struct rt_encoding e = {0};
    uint8_t mask[64] = {0};
    assert_ok(rt_tokenizer_encode(b.t.tok, "User says hello the answer", 26, &e, &err));
    for (size_t i = e.n / 2; i < e.n; i++)
        mask[i] = 1;
    b.r = rf_rows(&b.t, e.ids, mask, (int64_t)e.n, 8, rf_hash_logit, NULL);
    b.m = rf_make(&b.t, &b.s, &b.r, RT_RETARGET_EXACT);
    assert_int_equal(b.m.reject, RT_REJECT_PROMPT);
    rt_encoding_free(&e);
    rf_done(&b);
}

/* ---- plain text ---- */
static void text_with_and_without_bos(void **state)
{
    (void)state;
    struct rf_both b;
    retarget(&b, DEEPSEEK, QWEN, " the answer is 42", NULL); /* BOS on the teacher's side alone: the student's first token has no row */
    assert_int_equal(b.m.text.student.first, 0);
    assert_int_equal(b.m.place[0].teacher, 1);
    assert_int_equal(b.m.rows.n_tokens - 1, b.m.counts.targets);
    assert_int_equal(b.m.rows.position[0], 0);
    rf_done(&b);
    retarget(&b, DEEPSEEK, LLAMA, " the answer is 42", NULL); /* on both */
    assert_int_equal(b.m.text.student.first, 1);
    assert_int_equal(b.m.place[1].teacher, 1);
    assert_true(rf_row_of(&b.m, 1) >= 0);
    rf_done(&b);
    retarget(&b, QWEN, LLAMA, " the answer is 42", NULL); /* on the student's alone: nothing predicted its first token */
    assert_int_equal(b.m.text.student.first, 1);
    assert_int_equal(rf_row_of(&b.m, 1), -1);
    assert_int_equal(b.m.counts.masked[RT_MASK_UNSTORED], 1);
    assert_true(rf_row_of(&b.m, 2) >= 0);
    rf_done(&b);
}

/* An end of text inside: the student's, one unit, and what follows stays in place. */
static void an_end_inside_a_text(void **state)
{
    (void)state;
    struct rf_both b;
    retarget(&b, DEEPSEEK, QWEN, "the answer<\xef\xbd\x9c" "end\xe2\x96\x81of\xe2\x96\x81sentence\xef\xbd\x9c>So x", NULL);
    int64_t i = 0;
    while (i < b.m.rows.n_tokens && b.m.rows.ids[i] != b.m.map.student_end)
        i++;
    assert_true(i < b.m.rows.n_tokens - 1);
    assert_int_equal(b.m.place[i].kind, RT_PLACE_WHOLE);
    assert_true(rf_prob(&b.m, rf_row_of(&b.m, i), b.m.map.student_end) > 0.05);
    assert_string_equal(rf_token(&b.m, i + 1), "So");
    assert_true(b.m.place[i + 1].teacher > b.m.place[i].teacher);
    rf_done(&b);
}

/* ---- the end of a turn is not always EOS ---- */

/* The model in `from`, whose configuration calls another token EOS, as base models with a chat template do. */
static struct rt_model_dir with_eos(const char *name, const char *from, const char *was, const char *eos)
{
    struct rt_err err = {0};
    static const char *const files[] = {"tokenizer.json", "tokenizer_config.json"};
    const char *dir = test_tmp(name);
    char path[4096], old[64];
    assert_ok(rt_mkdirs(dir, &err));
    snprintf(old, sizeof old, "\"eos_token\": \"%s\"", was);
    for (int i = 0; i < 2; i++) {
        struct rt_buf b = {0}, out = {0};
        assert_ok(rt_path_join(path, sizeof path, test_data(from), files[i], &err));
        assert_ok(rt_file_read_all(path, 1 << 24, &b, &err));
        assert_ok(rt_buf_puts(&b, "", &err));
        const char *at = i == 1 ? strstr(b.data, old) : NULL;
        assert_true(i == 0 || at != NULL);
        const size_t head = at != NULL ? (size_t)(at - b.data) : b.len, tail = at != NULL ? head + strlen(old) : b.len;
        assert_ok(rt_buf_append(&out, b.data, head, &err));
        if (at != NULL)
            assert_ok(rt_buf_printf(&out, &err, "\"eos_token\": \"%s\"", eos));
        assert_ok(rt_buf_append(&out, b.data + tail, b.len - tail, &err));
        assert_ok(rt_path_join(path, sizeof path, dir, files[i], &err));
        assert_ok(rt_publish_bytes(path, out.data, out.len, &err));
        rt_buf_free(&b);
        rt_buf_free(&out);
    }
    return rf_model(dir);
}

/* A teacher that may stop anywhere: by the end of a turn and by EOS, ctx. */
static double may_stop(const void *ctx, int64_t i, uint32_t prev, uint32_t w, uint32_t next)
{
    const uint32_t *stops = ctx;
    return w == stops[0] ? 4 : w == stops[1] ? 3.5 : rf_hash_logit(NULL, i, prev, w, next);
}

static double said_of(const struct rf_both *b, int64_t i, uint32_t id)
{
    const struct rt_rows *r = &b->r.rows;
    for (int64_t row = 0; row < r->n_rows; row++)
        for (int j = 0; j < r->k && (int64_t)r->position[row] + 1 == b->m.place[i].teacher; j++)
            if (r->topk_ids[row * r->k + j] == id)
                return exp((double)r->topk_logits[row * r->k + j] - (double)r->lse[row * r->n_lse]);
    return 0;
}

/* Wherever a row begins with a teacher token, the teacher's end of a turn is the student's end of a turn and its EOS the student's EOS; where that is one
 * token, it takes both. */
static void stops(struct rf_both *b)
{
    struct rt_err err = {0};
    const uint32_t end = rt_template_end_id(b->t.tmpl), eos = (uint32_t)rt_tokenizer_eos(b->t.tok), own = rt_template_end_id(b->s.tmpl),
                   own_eos = (uint32_t)rt_tokenizer_eos(b->s.tok), both_ids[2] = {end, eos};
    struct rt_rendered r = {0};
    const struct rt_message m = {.role = "user", .content = "Q", .content_len = 1, .loss = -1};
    int64_t rows = 0;
    assert_ok(rt_template_completion(b->t.tmpl, &m, 1, "So x = 42 and then", 18, "test", &r, &err));
    b->r = rf_rows(&b->t, r.enc.ids, r.loss_mask, (int64_t)r.enc.n, 24, may_stop, both_ids);
    b->m = rf_make(&b->t, &b->s, &b->r, RT_RETARGET_EXACT);
    assert_int_equal(b->m.reject, RT_REJECT_NONE);
    assert_int_equal(b->m.rows.ids[b->m.rows.n_tokens - 1], own);
    for (int64_t i = b->m.text.student.first; i < b->m.text.student.n; i++) {
        const int64_t row = rf_row_of(&b->m, i);
        if (row < 0 || b->m.place[i].offset > 0)
            continue;
        const double by_end = said_of(b, i, end), by_eos = end != eos ? said_of(b, i, eos) : 0;
        assert_true(by_end > 0.02); /* e^4 of e^4 + e^3.5, at most e^6.5 for what comes, and some 380 others of 1.4 on average: 0.04 and more */
        assert_true(fabs(rf_prob(&b->m, row, own) - by_end - (own == own_eos ? by_eos : 0)) < 1e-6);
        if (own != own_eos)
            assert_true(fabs(rf_prob(&b->m, row, own_eos) - by_eos) < 1e-6);
        rows++;
    }
    assert_true(rows > 3);
    rt_rendered_free(&r);
    rf_done(b);
}

static void ends_that_are_not_eos(void **state)
{
    (void)state;
    struct rf_both student = {.t = rf_model(test_data(DEEPSEEK)), .s = with_eos("base-a", QWEN, "<|im_end|>", "<|endoftext|>")};
    assert_true(rt_template_end_id(student.s.tmpl) != (uint32_t)rt_tokenizer_eos(student.s.tok));
    stops(&student);
    struct rf_both two = {.t = with_eos("base-b", QWEN, "<|im_end|>", "<|endoftext|>"), .s = with_eos("base-c", LLAMA, "<|eot_id|>", "<|end_of_text|>")};
    stops(&two);
    struct rf_both teacher = {.t = with_eos("base-d", QWEN, "<|im_end|>", "<|endoftext|>"), .s = rf_model(test_data(DEEPSEEK))};
    stops(&teacher);
}

/* ---- states ---- */
static void states_where_bytes_end_together(void **state)
{
    (void)state;
    static const char *const t[] = {"2 0", "20 1"}, *const s[] = {"x ="};
    struct rf_both b;
    toy(&b, t, 2, s, 1, "x=201y");
    /* teacher x = 201 y, student x= 2 0 1 y */
    uint16_t states[6 * 2];
    const uint8_t want[5] = {1, 0, 0, 1, 1}, from[5] = {1, 0, 0, 2, 3};
    for (int i = 0; i < 12; i++)
        states[i] = (uint16_t)(0x3f80 + i);
    b.r.id.n_features = b.r.rows.n_features = 1;
    b.r.id.feature[0] = (struct rt_feature_spec){.layer = 2, .dim = 2, .dtype = RT_BF16};
    b.r.rows.feature[0] = states;
    rf_made_free(&b.m);
    b.m = rf_make(&b.t, &b.s, &b.r, RT_RETARGET_EXACT);
    assert_int_equal(b.m.rows.n_tokens, 5);
    for (int i = 0; i < 5; i++) {
        const uint16_t *got = (const uint16_t *)b.m.rows.feature[0] + 2 * i;
        assert_int_equal(b.m.rows.feature_mask[i], want[i]);
        assert_int_equal(got[0], want[i] ? states[2 * from[i]] : 0);
        assert_int_equal(got[1], want[i] ? states[2 * from[i] + 1] : 0);
    }
    assert_int_equal(b.m.counts.states, 5);
    assert_int_equal(b.m.counts.states_paired, 3);
    rf_done(&b);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(places_by_units),
    cmocka_unit_test(places_with_offsets_and_masks),
    cmocka_unit_test(a_thought_in_another_template),
    cmocka_unit_test(think_tags),
    cmocka_unit_test(an_empty_completion),
    cmocka_unit_test(split_characters_and_spaces),
    cmocka_unit_test(digits_inside_a_number),
    cmocka_unit_test(a_crossing_token_keeps_its_label),
    cmocka_unit_test(the_realised_token_wins),
    cmocka_unit_test(not_nfc),
    cmocka_unit_test(bytes_that_do_not_agree),
    cmocka_unit_test(not_utf8),
    cmocka_unit_test(an_unknown_prompt),
    cmocka_unit_test(text_with_and_without_bos),
    cmocka_unit_test(an_end_inside_a_text),
    cmocka_unit_test(ends_that_are_not_eos),
    cmocka_unit_test(states_where_bytes_end_together),
};
RT_SUITE(retarget_text, tests)
