/* One reader for several devices: every device gets every byte, files are read once, and nobody waits for ever, whoever runs ahead, begins later, ends early
 * or meets an error. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "core/io.h"
#include "teacher/part_table.h"
#include "teacher/read_probe.h"
#include "tests/far_device.h"
#include "tests/teacher_fixture.h"

enum { MEMBERS = 3, PASSES = 2 };

struct reader {
    struct rt_device d;
    struct rt_weights *w;
    const struct rt_tensors *ts;
    const struct rt_teacher_config *c;
    struct rt_part_id *parts;
    int64_t n, first, last; /* parts of the pass; where this one begins and ends it */
    unsigned pace;          /* microseconds a part, at most */
    int64_t got, wrong;
    pthread_t thread;
    enum rt_status st;
    struct rt_err err;
};

/* Are the part's bytes those of the files? */
static bool same(const struct reader *r, const struct rt_part *p)
{
    struct rt_part_plan plan;
    struct rt_err err = {0};
    bool good = rt_part_plan(r->ts, r->c, p->id, &plan, &err) == RT_OK;
    for (int i = 0; good && i < plan.n; i++)
        for (int s = 0; s < 2; s++) {
            const struct rt_tensor *t = s == 0 ? plan.t[i].weight : plan.t[i].scale;
            if (t == NULL)
                continue;
            char *want = malloc(t->bytes);
            good &= rt_tensors_read(r->ts, t, want, &err) == RT_OK && memcmp(want, (const char *)p->block + (s == 0 ? plan.t[i].at : plan.t[i].scale_at), t->bytes) == 0;
            free(want);
        }
    return good;
}

static void *read_pass(void *self)
{
    struct reader *r = self;
    const struct rt_part *p;
    rt_err_clear(&r->err);
    r->got = 0;
    unsigned seed = (unsigned)r->first + r->pace;
    r->st = rt_weights_begin(r->w, r->parts + r->first, r->n - r->first, &r->err);
    for (int64_t i = r->first; r->st == RT_OK && i < r->last; i++) {
        r->st = rt_weights_next(r->w, &p, &r->err);
        if (r->st != RT_OK)
            break;
        r->wrong += !same(r, p);
        r->got++;
        if (r->pace > 0)
            usleep((unsigned)rand_r(&seed) % r->pace);
        r->st = rt_weights_release(r->w, p, &r->err);
    }
    rt_weights_end(r->w);
    rt_weights_expect(r->w, false);
    return NULL;
}

static void open_readers(struct reader r[MEMBERS], const char *dir, struct rt_teacher_config *c, const struct rt_backend *far, bool keep, int threads)
{
    struct rt_err err = {0};
    memset(r, 0, MEMBERS * sizeof *r);
    assert_ok(rt_teacher_config_load(dir, c, &err));
    for (int i = 0; i < MEMBERS; i++) {
        assert_ok(rt_device_open(far, &(const struct rt_dev_options){.threads = 1}, &r[i].d, &err));
        const struct rt_weights_options o = {.dir = dir, .config = c, .device = &r[i].d, .threads = threads, .with = i > 0 ? r[0].w : NULL};
        assert_ok(rt_weights_open(&o, &r[i].w, &err));
        const struct rt_weights_budget b = {.host = rt_weights_staging(r[i].w) + (keep ? (uint64_t)64 << 20 : 0), .device = 2 * rt_weights_largest_part(r[i].w)};
        assert_ok(rt_weights_set_budget(r[i].w, &b, &err));
        r[i].ts = rt_weights_tensors(r[0].w);
        r[i].c = c;
    }
    int64_t n = 1;
    for (int l = 0; l < c->layers; l++)
        n += rt_weights_layer_parts(c, l, NULL);
    struct rt_part_id *parts = calloc((size_t)n, sizeof *parts);
    n = 0;
    for (int l = 0; l < c->layers; l++)
        n += rt_weights_layer_parts(c, l, parts + n);
    parts[n++] = (struct rt_part_id){.kind = RT_PART_HEAD};
    for (int i = 0; i < MEMBERS; i++) {
        r[i].parts = parts;
        r[i].n = r[i].last = n;
    }
}

static void close_readers(struct reader r[MEMBERS])
{
    free(r[0].parts);
    for (int i = MEMBERS - 1; i >= 0; i--) {
        rt_weights_free(r[i].w);
        rt_device_close(&r[i].d);
    }
}

static uint64_t run_round(struct reader r[MEMBERS])
{
    uint64_t before = 0, after = 0;
    for (int i = 0; i < MEMBERS; i++) {
        before += rt_weights_bytes_read(r[i].w);
        rt_weights_expect(r[i].w, true);
    }
    for (int i = 0; i < MEMBERS; i++)
        assert_int_equal(pthread_create(&r[i].thread, NULL, read_pass, &r[i]), 0);
    for (int i = 0; i < MEMBERS; i++) {
        pthread_join(r[i].thread, NULL);
        after += rt_weights_bytes_read(r[i].w);
    }
    return after - before;
}

static void files_are_read_once(void **state)
{
    (void)state;
    const struct rt_backend far = far_backend();
    const char *dir = test_data("tests/data/cases/v3_fp8");
    for (int k = 0; k < 8; k++) {
        struct rt_teacher_config c;
        struct reader r[MEMBERS];
        open_readers(r, dir, &c, &far, k & 1, k & 2 ? 3 : 1);
        for (int pass = 0; pass < PASSES; pass++) {
            for (int i = 0; i < MEMBERS; i++)
                r[i].pace = k & 4 ? (unsigned)i * 700 : 0; /* one as fast as can be, others behind */
            const uint64_t read = run_round(r);
            for (int i = 0; i < MEMBERS; i++) {
                if (r[i].st != RT_OK)
                    fail_msg("device %d: %s", i, r[i].err.msg);
                assert_int_equal(r[i].got, r[i].n);
                assert_int_equal(r[i].wrong, 0);
            }
            /* a part's bytes count the alignment of its tensors: what is read lies a little below them */
            const uint64_t model = rt_weights_model_bytes(r[0].w);
            if (pass > 0 && (k & 1))
                assert_int_equal(read, 0);
            else
                assert_in_range(read, model * 9 / 10, model);
        }
        close_readers(r);
    }
}

/* As after a stop at different layers, and with devices that end early: whoever goes on gets all of its bytes. */
static void whoever_begins_later_or_ends_early(void **state)
{
    (void)state;
    const struct rt_backend far = far_backend();
    const char *dir = test_data("tests/data/cases/v3_fp8");
    struct rt_teacher_config c;
    struct reader r[MEMBERS];
    for (int keep = 0; keep < 2; keep++) {
        open_readers(r, dir, &c, &far, keep, 1);
        const int64_t n = r[0].n;
        const int64_t first[][MEMBERS] = {{0, n / 2, n - 1}, {n - 1, 0, n / 3}, {n / 3, n / 3, 0}, {0, 0, 0}, {0, 0, 0}};
        const int64_t last[][MEMBERS] = {{n, n, n}, {n, n, n}, {n, n, n}, {1, n, n / 2}, {n / 2, 2, n}};
        for (size_t k = 0; k < sizeof first / sizeof *first; k++) {
            for (int i = 0; i < MEMBERS; i++) {
                r[i].first = first[k][i];
                r[i].last = last[k][i];
                r[i].pace = (unsigned)((i + (int)k) % MEMBERS) * 300;
            }
            run_round(r);
            for (int i = 0; i < MEMBERS; i++) {
                if (r[i].st != RT_OK)
                    fail_msg("device %d: %s", i, r[i].err.msg);
                assert_int_equal(r[i].got, r[i].last - r[i].first);
                assert_int_equal(r[i].wrong, 0);
            }
        }
        close_readers(r);
    }
}

/* A file that is cut short ends every pass that needs it, with its name; mended, all go on. */
static void a_short_file_is_told_to_all(void **state)
{
    (void)state;
    const struct rt_backend far = far_backend();
    struct rt_teacher_config c;
    struct reader r[MEMBERS];
    char dir[512], cmd[2400];
    snprintf(dir, sizeof dir, "%s", test_tmp("feed-short"));
    snprintf(cmd, sizeof cmd, "cp -r '%s' '%s'", test_data("tests/data/cases/v3_fp8"), dir);
    assert_int_equal(system(cmd), 0);
    for (int keep = 0; keep < 2; keep++) {
        open_readers(r, dir, &c, &far, keep, 2);
        const struct rt_tensor *t = rt_tensors_find(r[0].ts, "model.layers.1.mlp.experts.2.up_proj.weight");
        assert_non_null(t);
        const char *file = rt_tensors_file(r[0].ts, t->file);
        snprintf(cmd, sizeof cmd, "cp '%s' '%s.whole' && truncate -s %lu '%s'", file, file, (unsigned long)t->offset + 7, file);
        assert_int_equal(system(cmd), 0);
        for (int i = 0; i < MEMBERS; i++)
            r[i].pace = (unsigned)i * 300;
        run_round(r);
        for (int i = 0; i < MEMBERS; i++) {
            assert_int_not_equal(r[i].st, RT_OK);
            if (strstr(r[i].err.msg, file) == NULL || strstr(r[i].err.msg, "layer 1 ") == NULL)
                fail_msg("device %d: %s", i, r[i].err.msg);
        }
        snprintf(cmd, sizeof cmd, "cat '%s.whole' >'%s' && rm '%s.whole'", file, file, file);
        assert_int_equal(system(cmd), 0);
        run_round(r);
        for (int i = 0; i < MEMBERS; i++) {
            assert_int_equal(r[i].st, RT_OK);
            assert_int_equal(r[i].wrong, 0);
        }
        close_readers(r);
    }
}

/* Rates are measured on files that are large enough to tell, with the counts that were asked for. */
static void reading_is_measured(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_tensors *ts;
    struct rt_read_probe p;
    char path[512];
    const char header[] = "{\"a\":{\"dtype\":\"F32\",\"shape\":[25165824],\"data_offsets\":[0,100663296]}}       ";
    const uint64_t n = sizeof header - 1;
    snprintf(path, sizeof path, "%s", test_tmp("probe.safetensors"));
    FILE *f = fopen(path, "wb");
    fwrite(&n, sizeof n, 1, f);
    fwrite(header, 1, n, f);
    fclose(f);
    assert_int_equal(truncate(path, (off_t)(sizeof n + n + 100663296)), 0);
    assert_ok(rt_tensors_open(path, &ts, &err));
    assert_ok(rt_read_probe(ts, 1, 4, 0, &p, &err)); /* over before it begins: a chunk each all the same */
    assert_int_equal(p.n, 3);
    for (int i = 0; i < p.n; i++)
        assert_true(p.rate[i] > 0);
    assert_ok(rt_read_probe(ts, 1, 4, 0.02, &p, &err));
    assert_int_equal(p.n, 3);
    assert_int_equal(p.readers[2], 4);
    assert_in_range(p.best, 0, 2);
    for (int i = 0; i < p.n; i++)
        assert_true(p.rate[i] > 0);
    assert_ok(rt_read_probe(ts, 3, 3, 0.02, &p, &err)); /* as many as are asked for, and no others */
    assert_true(p.n == 1 && p.best == 0 && p.readers[0] == 3 && p.rate[0] > 0);
    assert_ok(rt_read_probe(ts, 24, 24, 0, &p, &err)); /* more than are tried */
    assert_true(p.n == 1 && p.readers[0] == 16);
    rt_tensors_free(ts);
    assert_ok(rt_tensors_open(test_data("tests/data/cases/v3_fp8"), &ts, &err));
    assert_ok(rt_read_probe(ts, 1, 4, 0.02, &p, &err));
    assert_int_equal(p.best, -1);
    rt_tensors_free(ts);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(files_are_read_once),
    cmocka_unit_test(whoever_begins_later_or_ends_early),
    cmocka_unit_test(a_short_file_is_told_to_all),
    cmocka_unit_test(reading_is_measured),
};
RT_SUITE(teacher_feed, tests)
