/* What a student's tokenizer leaves of a teacher's rows, before a teacher has scored anything.
 *
 *     bench_retarget_overlap TEACHER STUDENT FILE.jsonl ...
 *
 * TEACHER, STUDENT: directories with a tokenizer.json. FILE: lines with "text", or "prompt" and "completion" (the completion is taken), or
 * "messages" (assistants' contents). Prints Markdown: the overlap of the vocabularies, and one row a file:
 *
 *   1:1         student tokens that are one teacher token
 *   on a start  ... that begin where a teacher token does
 *   exact       ... that lie inside one teacher token: `retarget --mode exact` decides their rows by bytes
 *   crossing    ... that reach over the end of one: labels alone
 *   blank       ... that are white space alone: labels alone, too, wherever they lie
 *   digits 1:1  of the student tokens that are digits
 *   longest     tokens, on either side, between two ends in common
 *   B/token     bytes of the text a token, teacher and student
 *   commonest   crossing tokens
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "distill/jsonl.h"
#include "distill/overlap.h"
#include "distill/retarget_vocab.h"
#include "formats/unicode.h"

struct bench {
    struct rt_model_dir teacher, student;
    struct rt_vocab_map map;
    struct rt_overlap o;
};

static enum rt_status add_member(struct rt_overlap *o, const struct rt_json *v, const char *key, struct rt_err *err)
{
    size_t len;
    const char *text = rt_json_as_string(rt_json_get(v, key), &len);
    return text != NULL ? rt_overlap_add(o, text, len, err) : RT_OK;
}

static enum rt_status add_line(struct rt_overlap *o, const struct rt_json *v, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_json *messages = rt_json_get(v, "messages");
    RT_TRY(add_member(o, v, "text", err));
    RT_TRY(add_member(o, v, "completion", err));
    for (size_t i = 0; i < rt_json_len(messages); i++) {
        const char *role = rt_json_as_string(rt_json_get(rt_json_at(messages, i), "role"), NULL);
        if (role != NULL && strcmp(role, "assistant") == 0)
            RT_TRY(add_member(o, rt_json_at(messages, i), "content", err));
    }
out:
    return st;
}

static double percent(int64_t a, int64_t b)
{
    return b > 0 ? 100.0 * (double)a / (double)b : 0;
}

static void print_crossing(const struct rt_overlap *o)
{
    uint32_t best[RT_OVERLAP_TOP];
    const int n = rt_overlap_top(o, best);
    for (int i = 0; i < n; i++) {
        const char *bytes = "";
        size_t len = 0;
        rt_tokenizer_bytes(o->student, best[i], &bytes, &len);
        const bool valid = rt_utf8_prefix(bytes, len) == len;
        printf("%s`", i > 0 ? " " : "");
        for (size_t b = 0; b < len; b++)
            if ((unsigned char)bytes[b] < 0x20 || bytes[b] == '|' || (!valid && (unsigned char)bytes[b] >= 0x80))
                printf("\\x%02x", (unsigned char)bytes[b]);
            else
                putchar(bytes[b]);
        printf("` %u", o->crossing[best[i]]);
    }
}

static enum rt_status add_file(struct rt_overlap *o, const char *path, struct rt_err *err)
{
    enum rt_status st;
    struct rt_jsonl f = {0};
    const struct rt_json *v;
    const char *name = strrchr(path, '/') != NULL ? strrchr(path, '/') + 1 : path;
    const struct rt_overlap_counts *c = &o->c;
    rt_overlap_clear(o);
    RT_TRY(rt_jsonl_open(path, &f, err));
    for (;;) {
        RT_TRY(rt_jsonl_next(&f, &v, err));
        if (v == NULL)
            break;
        RT_TRY(add_line(o, v, err));
    }
    const int64_t n = c->student;
    printf("| %.*s | %ld (%ld) | %.2f | %.1f %% | %.1f %% | **%.1f %%** | %.1f %% | %.1f %% | %.1f %% of %ld | %ld | %.2f / %.2f | ", (int)strcspn(name, "."), name,
           (long)c->texts, (long)c->left_out, (double)c->bytes / 1e6, percent(c->kind[RT_PLACE_WHOLE], n), percent(c->boundary, n), percent(rt_overlap_exact(c), n),
           percent(c->kind[RT_PLACE_CROSSING], n), percent(c->blank, n), percent(c->digits_whole, c->digits), (long)c->digits, (long)c->longest,
           (double)c->bytes / (double)(c->teacher > 0 ? c->teacher : 1), (double)c->bytes / (double)(n > 0 ? n : 1));
    print_crossing(o);
    printf(" |\n");
out:
    rt_jsonl_close(&f);
    return st;
}

static void print_vocabularies(const struct bench *o)
{
    int64_t teacher = 0, shared = 0, student = 0, mapped = 0;
    const char *bytes;
    size_t len;
    for (uint32_t w = 0; w < o->map.n_teacher; w++) {
        if (!rt_tokenizer_bytes(o->teacher.tok, w, &bytes, &len) || rt_tokenizer_is_added(o->teacher.tok, w))
            continue;
        teacher++;
        shared += o->map.equal[w] != RT_NO_ID;
        mapped += rt_vocab_first(&o->map, w, 0) != RT_NO_ID;
    }
    for (uint32_t u = 0; u < o->map.n_student; u++)
        student += rt_tokenizer_bytes(o->student.tok, u, &bytes, &len) && !rt_tokenizer_is_added(o->student.tok, u);
    printf("vocabularies: %ld and %ld ordinary tokens, %ld the same bytes: %.1f %% of the teacher's, %.1f %% of the student's; %ld of the teacher's begin with a "
           "student token\n\n", (long)teacher, (long)student, (long)shared, percent(shared, teacher), percent(shared, student), (long)mapped);
}

static enum rt_status run(struct bench *o, int argc, char **argv, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_model_dir_open(argv[1], NULL, NULL, &o->teacher, err));
    RT_TRY(rt_model_dir_open(argv[2], NULL, NULL, &o->student, err));
    if (o->teacher.tok == NULL || o->student.tok == NULL)
        RT_FAIL(err, USAGE, "%s: has no tokenizer.json", o->teacher.tok == NULL ? argv[1] : argv[2]);
    RT_TRY(rt_vocab_map_create(&o->teacher, &o->student, &o->map, err));
    RT_TRY(rt_overlap_open(&o->o, o->teacher.tok, o->student.tok, err));
    print_vocabularies(o);
    printf("| text | texts (left out) | MB | 1:1 | on a start | exact | crossing | blank | digits 1:1 | longest | B/token | commonest crossing |\n"
           "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n");
    for (int i = 3; i < argc; i++)
        RT_TRY(add_file(&o->o, argv[i], err));
out:
    return st;
}

int main(int argc, char **argv)
{
    struct bench o = {0};
    struct rt_err err = {0};
    if (argc < 4) {
        fprintf(stderr, "usage: %s TEACHER STUDENT FILE.jsonl ...\n", argv[0]);
        return 2;
    }
    const enum rt_status st = run(&o, argc, argv, &err);
    if (st != RT_OK)
        fprintf(stderr, "bench_retarget_overlap: %s\n", err.msg);
    rt_overlap_close(&o.o);
    rt_vocab_map_free(&o.map);
    rt_model_dir_close(&o.teacher);
    rt_model_dir_close(&o.student);
    return rt_exit_code(st);
}
