#include "tests/fuzz.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/io.h"
#include "core/rng.h"
#include "tests/fault_alloc.h"
#include "tests/suite.h"

const struct fuzz_target *const fuzz_targets[] = {
    &fuzz_json, &fuzz_safetensors, &fuzz_index, &fuzz_shard, &fuzz_manifest, &fuzz_identity, &fuzz_tokenizer, &fuzz_encode, &fuzz_template,
    &fuzz_dataset, &fuzz_jsonl, &fuzz_teacher_config, &fuzz_student_config, &fuzz_checkpoint, &fuzz_run_config, &fuzz_arguments, &fuzz_verify,
    &fuzz_inspect, &fuzz_record, &fuzz_metrics, &fuzz_state, &fuzz_hold, &fuzz_retarget, NULL,
};

static char failure[1024]; /* of the case that runs */

void fuzz_fail(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    if (failure[0] == '\0')
        vsnprintf(failure, sizeof failure, fmt, ap);
    va_end(ap);
}

static char place[512];

void fuzz_must(enum rt_status st, const struct rt_err *err)
{
    if (st != RT_OK) {
        fprintf(stderr, "in preparation: %s\n", err->msg);
        abort();
    }
}

void fuzz_dir(const char *name)
{
    struct rt_err err = {0};
    snprintf(place, sizeof place, "%s", test_tmp(name));
    fuzz_must(rt_mkdirs(place, &err), &err);
}

const char *fuzz_place(void)
{
    return place;
}

const char *fuzz_at(const char *name)
{
    static char path[4][1024];
    static int i;
    i = (i + 1) % 4;
    snprintf(path[i], sizeof path[i], "%s/%s", place, name);
    return path[i];
}

void fuzz_seed(struct fuzz_seeds *s, const void *data, size_t n)
{
    if (s->n == FUZZ_MAX_SEEDS || rt_buf_append(&s->at[s->n], data, n, NULL) != RT_OK)
        abort();
    s->n++;
}

void fuzz_seed_file(struct fuzz_seeds *s, const char *path)
{
    struct rt_err err = {0};
    if (s->n == FUZZ_MAX_SEEDS || rt_file_read_all(path, FUZZ_MAX_INPUT, &s->at[s->n], &err) != RT_OK) {
        fprintf(stderr, "seed %s: %s\n", path, err.msg);
        abort();
    }
    s->n++;
}

void fuzz_put(const char *path, const uint8_t *data, size_t n)
{
    const int fd = open(path, O_WRONLY | O_CREAT, 0600); /* with O_TRUNC it takes a thousand times as long */
    if (fd < 0 || pwrite(fd, data, n, 0) != (ssize_t)n || ftruncate(fd, (off_t)n) != 0)
        fuzz_fail("cannot write %s", path);
    close(fd);
}

/* ---- mutation ---- */
struct dice {
    uint64_t seed, input, n;
};

static uint64_t roll(struct dice *d, uint64_t below)
{
    return below == 0 ? 0 : rt_rng_u64(d->seed, d->input, d->n++) % below;
}

static const char *const numbers[] = {"0", "1", "-1", "2", "255", "256", "65536", "2147483647", "2147483648", "4294967295", "4294967296",
                                      "9007199254740993", "9223372036854775807", "-9223372036854775808", "18446744073709551615",
                                      "211106198978564", "1e308", "1e-320", "0.5", "1e999", "NaN", "null", "\"1\"", "[]", "1.0"};
static const uint64_t binaries[] = {0, 1, 7, 8, 127, 128, 255, 256, 65535, 65536, 0x7fffffff, 0x80000000u, 0xffffffffu, 0x100000000u,
                                    0x7fffffffffffffffu, 0x8000000000000000u, 0xffffffffffffffffu, 0xfffffffffffffff8u};

/* data [len of cap]: [at, at+cut) becomes n bytes of `with`; returns the new length (nothing changes where it would not fit). */
static size_t replace_bytes(uint8_t *data, size_t len, size_t at, size_t cut, const void *with, size_t n)
{
    if (len - cut + n > FUZZ_MAX_INPUT)
        return len;
    memmove(data + at + n, data + at + cut, len - at - cut);
    memcpy(data + at, with, n);
    return len - cut + n;
}

static size_t replace_number(struct dice *d, uint8_t *data, size_t len)
{
    size_t at = (size_t)roll(d, len), end;
    while (at < len && (data[at] < '0' || data[at] > '9'))
        at++;
    for (end = at; end < len && ((data[end] >= '0' && data[end] <= '9') || data[end] == '.'); end++)
        ;
    const char *with = numbers[roll(d, sizeof numbers / sizeof *numbers)];
    return at == end ? len : replace_bytes(data, len, at, end - at, with, strlen(with));
}

static void replace_binary(struct dice *d, uint8_t *data, size_t len)
{
    const uint64_t v = binaries[roll(d, sizeof binaries / sizeof *binaries)];
    const size_t width = (size_t)1 << roll(d, 4), at = (size_t)roll(d, roll(d, 4) == 0 ? 16 : len);
    uint8_t bytes[8];
    const bool big = roll(d, 2) == 0; /* msgpack's integers are big-endian */
    for (size_t i = 0; i < width; i++)
        bytes[i] = (uint8_t)(v >> (8 * (big ? width - 1 - i : i)));
    if (at + width <= len)
        memcpy(data + at, bytes, width);
}

static size_t insert_word(struct dice *d, const char *const *words, uint8_t *data, size_t len)
{
    size_t n = 0;
    while (words != NULL && words[n] != NULL)
        n++;
    if (n == 0)
        return len;
    const char *w = words[roll(d, n)];
    const size_t k = strlen(w), at = (size_t)roll(d, len + 1), over = roll(d, 2) == 0 && at + k <= len ? k : 0;
    return replace_bytes(data, len, at, over, w, k);
}

static size_t mutate_once(struct dice *d, const struct fuzz_target *t, const struct fuzz_seeds *s, uint8_t *data, size_t len)
{
    static uint8_t tmp[FUZZ_MAX_INPUT];
    const size_t at = (size_t)roll(d, len), some = 1 + (size_t)roll(d, roll(d, 3) == 0 ? 200 : 8), n = some < len - at ? some : len - at;
    if (len == 0)
        return insert_word(d, t->words, data, len);
    switch (roll(d, 12)) {
    case 0: data[at] ^= (uint8_t)(1u << roll(d, 8)); return len;
    case 1: data[at] = (uint8_t)roll(d, 256); return len;
    case 2: return roll(d, 4) == 0 ? at : len; /* cut off */
    case 3: return replace_bytes(data, len, at, n, "", 0);
    case 4: /* twice, or many times */
        memcpy(tmp, data + at, n);
        for (uint64_t i = 0, times = roll(d, 8) == 0 ? 200 : 1; i < times; i++)
            len = replace_bytes(data, len, at, 0, tmp, n);
        return len;
    case 5: { /* from another file, or another place */
        const struct rt_buf *o = &s->at[roll(d, (uint64_t)s->n)];
        const size_t from = (size_t)roll(d, o->len), most = o->len - from < some * 4 ? o->len - from : some * 4;
        return replace_bytes(data, len, at, roll(d, 2) == 0 ? n : 0, o->data + from, most);
    }
    case 6:
    case 7: return replace_number(d, data, len);
    case 8: replace_binary(d, data, len); return len;
    case 9:
    case 10: return insert_word(d, t->words, data, len);
    default: { /* two places swapped */
        const size_t b = (size_t)roll(d, len);
        const uint8_t c = data[at];
        data[at] = data[b];
        data[b] = c;
        return len;
    }
    }
}

static size_t make_input(const struct fuzz_target *t, const struct fuzz_seeds *s, struct dice *d, uint8_t *data)
{
    const struct rt_buf *from = &s->at[roll(d, (uint64_t)s->n)];
    size_t len = from->len;
    memcpy(data, from->data, len);
    const uint64_t edits = 1 + roll(d, roll(d, 3) == 0 ? 16 : 3);
    for (uint64_t i = 0; i < edits; i++)
        len = mutate_once(d, t, s, data, len);
    if (t->repair != NULL && roll(d, 4) != 0)
        t->repair(data, len);
    return len;
}

/* ---- one case ---- */
static void judge(const struct fuzz_target *t, size_t n, enum rt_status st, const struct rt_err *err)
{
    const struct fault_use use = fault_use();
    if (st != RT_OK && err->msg[0] == '\0')
        fuzz_fail("status %d without a message", (int)st);
    /* memory is there: NOMEM would be about a size that nobody checked */
    if (st == RT_NOMEM || st == RT_INTERNAL || st == RT_DEVICE || st == RT_INTERRUPTED)
        fuzz_fail("status %d for a damaged file: %s", (int)st, err->msg);
    if (use.largest > 64 * n + (1 << 20) + t->extra)
        fuzz_fail("one allocation of %zu bytes for a file of %zu", use.largest, n);
    /* a value of JSON takes 330 bytes (parser and tree), from two bytes of text on */
    if (use.peak > (int64_t)(256 * n + (4 << 20) + t->extra))
        fuzz_fail("%ld bytes held for a file of %zu", (long)use.peak, n);
}

static double now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

/* The input in a block of its own, so that the sanitizers see a read behind it. */
static enum rt_status run_one(const struct fuzz_target *t, const uint8_t *data, size_t len, struct rt_err *err)
{
    uint8_t *own = malloc(len + 1);
    if (own == NULL)
        abort();
    memcpy(own, data, len);
    own[len] = 0;
    fault_arm(0, false);
    const enum rt_status st = t->run(own, len, err);
    fault_disarm();
    judge(t, len, st, err);
    free(own);
    return st;
}

/* Undamaged files are accepted, also with their checksums written again: else nothing behind the first check would be met. */
static void run_seeds(const struct fuzz_target *t, const struct fuzz_seeds *s, uint8_t *data)
{
    for (int k = 0; k < s->n; k++) {
        struct rt_err err = {0};
        memcpy(data, s->at[k].data, s->at[k].len);
        if (t->repair != NULL)
            t->repair(data, s->at[k].len);
        if (run_one(t, data, s->at[k].len, &err) != RT_OK)
            fuzz_fail("undamaged seed %d: %s", k, err.msg);
    }
}

const char *fuzz_run(const struct fuzz_target *t, int64_t first, int64_t n, double seconds, int64_t *done)
{
    static uint8_t data[FUZZ_MAX_INPUT];
    static char message[1400];
    struct fuzz_seeds s = {0};
    const double start = now();
    t->begin(&s);
    message[0] = failure[0] = '\0';
    run_seeds(t, &s, data);
    if (failure[0] != '\0')
        snprintf(message, sizeof message, "%s: %s", t->name, failure);
    int64_t i = first;
    for (; message[0] == '\0' && (n > 0 ? i < first + n : now() - start < seconds); i++) {
        struct dice d = {rt_rng_stream(t->name), (uint64_t)i, 0};
        struct rt_err err = {0};
        const size_t len = make_input(t, &s, &d, data);
        if (n == 0 || i == first) { /* one who looks for the input that hangs or crashes finds its number here */
            char at[32];
            snprintf(at, sizeof at, "%ld\n", (long)i);
            fuzz_put(test_tmp("fuzz-input"), (const uint8_t *)at, strlen(at));
        }
        run_one(t, data, len, &err);
        if (failure[0] != '\0')
            snprintf(message, sizeof message, "%s: input %ld: %s", t->name, (long)i, failure);
        if (message[0] != '\0')
            fuzz_put("/tmp/retort-fuzz-failure", data, len);
    }
    *done = i - first;
    if (t->end != NULL)
        t->end();
    for (int k = 0; k < s.n; k++)
        rt_buf_free(&s.at[k]);
    return message[0] != '\0' ? message : NULL;
}

int rt_fuzz_main(int argc, char **argv)
{
    const struct fuzz_target *t = NULL;
    const bool list = argc > 1 && strcmp(argv[1], "list") == 0;
    for (int i = 0; fuzz_targets[i] != NULL; i++) {
        if (list)
            puts(fuzz_targets[i]->name);
        if (argc > 1 && strcmp(argv[1], fuzz_targets[i]->name) == 0)
            t = fuzz_targets[i];
    }
    if (list)
        return 0;
    if (t == NULL || argc < 3) {
        fputs("usage: retort-tests --fuzz list | TARGET SECONDS [FIRST]; SECONDS 0 runs input FIRST alone\n", stderr);
        return 2;
    }
    int64_t done;
    const double seconds = strtod(argv[2], NULL);
    const int64_t first = argc > 3 ? strtoll(argv[3], NULL, 10) : 1000000; /* not those of make test again */
    printf("%s: the number of the input that runs is in %s\n", t->name, test_tmp("fuzz-input"));
    fflush(stdout);
    const char *bad = fuzz_run(t, first, seconds == 0 ? 1 : 0, seconds, &done);
    if (bad != NULL) {
        printf("FAILED %s; the input is in /tmp/retort-fuzz-failure\n", bad);
        return 1;
    }
    printf("ok %s: %ld inputs\n", t->name, (long)done);
    return 0;
}
