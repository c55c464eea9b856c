/* Rows that the teacher computes again: sound sets pass on every host backend, and each way in which rows can be wrong is noticed. */
#include "tests/suite.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "distill/doctor.h"
#include "formats/shard.h"
#include "tests/run_command.h"

#define CASE test_data("tests/data/cases/v3_fp8")
extern const struct rt_command rt_cmd_logits;

static const char *ids_file(void)
{
    static char path[512];
    snprintf(path, sizeof path, "%s", test_tmp("rescore-ids.jsonl"));
    FILE *f = fopen(path, "w");
    for (int s = 0; s < 12; s++) {
        fprintf(f, "{\"input_ids\": [");
        for (int i = 0; i < 14; i++)
            fprintf(f, "%s%d", i > 0 ? ", " : "", (s * 37 + i * i * 11 + 5) % 157);
        fprintf(f, "]}\n");
    }
    fclose(f);
    return path;
}

static const char *score(const char *name, const char *teacher, const char *numerics)
{
    struct rt_err err = {0};
    const char *dir = test_tmp(name);
    const char *const args[] = {"--teacher", teacher, "--data", ids_file(), "--out", dir, "--cache", "topk=8", "--lse", "1,2", "--memory", "400M", "--device", "cpu",
                                "--numerics", numerics, NULL};
    assert_ok(test_command(&rt_cmd_logits, args, &err));
    return dir;
}

static void doctor(struct rt_doctor *d, const char *backend)
{
    struct rt_err err = {0};
    const struct rt_backend *be;
    const struct rt_dev_options o = {.threads = 1};
    d->teacher = d->teacher != NULL ? d->teacher : CASE;
    d->out = ".";
    d->memory = d->memory > 0 ? d->memory : (int64_t)1 << 30;
    d->batch_tokens = 1024;
    d->top_k = 64;
    d->forward = true;
    assert_ok(rt_backend_select(backend, NULL, 0, &be, &err));
    assert_ok(rt_device_open(be, &o, &d->device, &err));
    assert_ok(rt_doctor_run(d, &err));
}

static void expect(struct rt_doctor *d, const char *name, enum rt_check_level level, const char *words)
{
    for (int i = 0; i < d->checks.n; i++) {
        const struct rt_check *k = &d->checks.at[i];
        if (strcmp(k->name, name) != 0)
            continue;
        if (k->level != level || strstr(k->detail, words) == NULL)
            fail_msg("%s %s: %s; expected %s with '%s'", rt_check_level_name(k->level), name, k->detail, rt_check_level_name(level), words);
        return;
    }
    fail_msg("no check %s", name);
}

static void close_doctor(struct rt_doctor *d)
{
    rt_doctor_close(d);
    rt_device_close(&d->device);
}

static void sound_rows_pass(void **state)
{
    (void)state;
    static const char *const numerics[] = {"w8a16", "w8a8"}, *const backend[] = {"cpu", "ref"};
    for (int i = 0; i < 2; i++) {
        const char *dir = score(numerics[i], CASE, numerics[i]);
        for (int b = 0; b < 2; b++) {
            struct rt_doctor d = {.shards = dir, .rescore = 40 * b};
            doctor(&d, backend[b]);
            expect(&d, "shards.rescored.kl", RT_CHECK_PASS, b == 0 ? "64 rows of 8 sequences" : "40 rows of 5 sequences");
            expect(&d, "shards.rescored.kl", RT_CHECK_PASS, numerics[i]);
            expect(&d, "shards.rescored.logits", RT_CHECK_PASS, "");
            expect(&d, "shards.rescored.sums", RT_CHECK_PASS, "");
            expect(&d, "shards.rescored.first", RT_CHECK_PASS, "");
            close_doctor(&d);
        }
    }
}

/* The set again with one thing changed. */
static const char *rewrite(const char *from, const char *name, const char *mode, float lse_off, int shift)
{
    struct rt_err err = {0};
    struct rt_shard_set *set;
    struct rt_shard_sink *s;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    struct rt_rows r;
    const char *dir = test_tmp(name);
    assert_ok(rt_shard_set_open(from, &set, &err));
    struct rt_row_identity id = *rt_shard_set_identity(set);
    if (mode != NULL)
        snprintf(id.mode, sizeof id.mode, "%s", mode);
    assert_ok(rt_shard_sink_open(dir, &id, &(const struct rt_shard_options){0}, &s, &sink, &resume, &err));
    for (int64_t i = 0; i < rt_shard_set_info(set)->sequences; i++) {
        assert_ok(rt_shard_set_get(set, i, &r, &err));
        float *lse = malloc((size_t)(r.n_rows * r.n_lse) * sizeof *lse);
        for (int64_t j = 0; j < r.n_rows * r.n_lse; j++)
            lse[j] = r.lse[j] + (j % r.n_lse == 1 ? lse_off : 0);
        r.lse = lse;
        if (shift > 0) { /* each row's entries are those of the row before */
            const int64_t n = --r.n_rows;
            r.position += 1;
            r.next_id += 1;
            float *lp = malloc((size_t)n * sizeof *lp);
            uint32_t *rank = malloc((size_t)n * sizeof *rank);
            for (int64_t j = 0; j < n; j++) {
                lp[j] = -20;
                rank[j] = 100;
                for (int k = 0; k < r.k; k++)
                    if (r.topk_ids[j * r.k + k] == r.next_id[j]) {
                        lp[j] = r.topk_logits[j * r.k + k] - r.lse[j * r.n_lse];
                        rank[j] = (uint32_t)k;
                    }
            }
            r.next_logprob = lp;
            r.next_rank = rank;
            assert_ok(sink.put(sink.self, &r, &err));
            free(lp);
            free(rank);
        } else {
            assert_ok(sink.put(sink.self, &r, &err));
        }
        free(lse);
    }
    assert_ok(sink.finish(sink.self, &err));
    rt_shard_sink_free(s);
    rt_shard_set_free(set);
    return dir;
}

static void wrong_rows_fail(void **state)
{
    (void)state;
    const char *right = score("right", CASE, "w8a16"), *fp8 = score("fp8", CASE, "w8a8");
    struct rt_doctor d = {.shards = rewrite(fp8, "label", "w8a16/f32/cpu", 0, 0)};
    doctor(&d, "cpu"); /* quantised activations under the name of plain ones */
    expect(&d, "shards.rescored.logits", RT_CHECK_FAIL, "95 %");
    close_doctor(&d);

    d = (struct rt_doctor){.shards = rewrite(right, "sums", NULL, 0.05f, 0)};
    doctor(&d, "cpu"); /* the log-sum-exp at T = 2 alone */
    expect(&d, "shards.rescored.kl", RT_CHECK_PASS, "");
    expect(&d, "shards.rescored.logits", RT_CHECK_PASS, "");
    expect(&d, "shards.rescored.sums", RT_CHECK_FAIL, "every T");
    close_doctor(&d);

    d = (struct rt_doctor){.shards = rewrite(right, "shifted", NULL, 0, 1)};
    doctor(&d, "cpu");
    expect(&d, "shards.rescored.kl", RT_CHECK_FAIL, "not this teacher's");
    expect(&d, "shards.rescored.first", RT_CHECK_FAIL, "first choice");
    close_doctor(&d);
    d = (struct rt_doctor){.shards = rewrite(right, "shifted-bf16", "w8a16/bf16/cuda", 0, 1)};
    doctor(&d, "cpu");
    expect(&d, "shards.rescored.kl", RT_CHECK_FAIL, "FP8 activations would move this model");
    expect(&d, "shards.rescored.logits", RT_CHECK_FAIL, "");
    close_doctor(&d);
    d = (struct rt_doctor){.shards = rewrite(right, "shifted-fp8", "w8a8/bf16/cuda", 0, 1)};
    doctor(&d, "cpu"); /* the widest bounds see it, too */
    expect(&d, "shards.rescored.kl", RT_CHECK_FAIL, "not this teacher's");
    expect(&d, "shards.rescored.logits", RT_CHECK_FAIL, "");
    close_doctor(&d);
}

/* One block's scale doubled: the headers, and so the checkpoint's identity, are the same. */
static void rows_of_a_damaged_checkpoint_fail(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_tensors *ts;
    char cmd[1200], dir[512];
    float v;
    snprintf(dir, sizeof dir, "%s", test_tmp("damaged"));
    snprintf(cmd, sizeof cmd, "cp -r '%s' '%s' && rm '%s'/expected.safetensors", CASE, dir, dir);
    assert_int_equal(system(cmd), 0);
    assert_ok(rt_tensors_open(dir, &ts, &err));
    const struct rt_tensor *t = rt_tensors_find(ts, "model.layers.1.self_attn.o_proj.weight_scale_inv");
    assert_non_null(t);
    assert_ok(rt_tensors_read_f32(ts, t, 0, 1, &v, &err));
    v *= 2;
    FILE *f = fopen(rt_tensors_file(ts, t->file), "r+b");
    assert_non_null(f);
    fseek(f, (long)t->offset, SEEK_SET);
    assert_int_equal(fwrite(&v, sizeof v, 1, f), 1);
    fclose(f);
    rt_tensors_free(ts);
    struct rt_doctor d = {.shards = score("of-damaged", dir, "w8a16")};
    doctor(&d, "cpu");
    expect(&d, "shards.teacher", RT_CHECK_PASS, "");
    expect(&d, "shards.rescored.kl", RT_CHECK_FAIL, "score it again");
    close_doctor(&d);
}

/* A checkpoint of V3.1's kind: activations are rounded with scales that are powers of two, on each backend, and the rows say so. */
static void scales_of_powers_of_two(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_shard_set *set;
    char cmd[2400], dir[512];
    snprintf(dir, sizeof dir, "%s", test_tmp("ue8m0"));
    snprintf(cmd, sizeof cmd, "cp -r '%s' '%s' && rm '%s'/expected.safetensors && sed -i 's/\"fmt\": \"e4m3\"/\"fmt\": \"e4m3\", \"scale_fmt\": \"ue8m0\"/' '%s'/config.json && grep -q ue8m0 '%s'/config.json",
             CASE, dir, dir, dir, dir);
    assert_int_equal(system(cmd), 0);
    const char *rows = score("ue8m0-rows", dir, "w8a8"), *plain = score("plain-rows", CASE, "w8a8");
    for (int b = 0; b < 2; b++) {
        struct rt_doctor d = {.shards = rows, .teacher = dir};
        doctor(&d, b == 0 ? "cpu" : "ref");
        expect(&d, "shards.rescored.kl", RT_CHECK_PASS, "stored: w8a8-ue8m0/f32/cpu");
        expect(&d, "shards.rescored.logits", RT_CHECK_PASS, "");
        close_doctor(&d);
    }
    /* the same weights without: other rows */
    struct rt_rows r;
    float one[64];
    assert_ok(rt_shard_set_open(rows, &set, &err));
    assert_ok(rt_shard_set_get(set, 0, &r, &err));
    memcpy(one, r.topk_logits, sizeof one);
    rt_shard_set_free(set);
    assert_ok(rt_shard_set_open(plain, &set, &err));
    assert_ok(rt_shard_set_get(set, 0, &r, &err));
    assert_true(memcmp(one, r.topk_logits, sizeof one) != 0);
    assert_string_equal(rt_shard_set_identity(set)->mode, "w8a8/f32/cpu");
    rt_shard_set_free(set);
}

static void what_is_left_out_is_said(void **state)
{
    (void)state;
    const char *dir = score("plain", CASE, "w8a16");
    struct rt_doctor d = {.shards = dir, .memory = 1 << 20};
    doctor(&d, "cpu");
    expect(&d, "shards.rescored", RT_CHECK_WARN, "--rescore 64 asks for it");
    close_doctor(&d);
    d = (struct rt_doctor){.shards = dir, .memory = 1 << 20, .rescore = 8};
    doctor(&d, "cpu");
    expect(&d, "shards.rescored", RT_CHECK_FAIL, "memory");
    close_doctor(&d);
    d = (struct rt_doctor){.shards = dir, .memory = 100000, .rescore = 150};
    doctor(&d, "cpu");
    expect(&d, "shards.rescored", RT_CHECK_FAIL, "--memory gives 100 KB: ask for fewer rows with --rescore");
    close_doctor(&d);
    d = (struct rt_doctor){.shards = dir, .max_length = 5, .rescore = 20};
    doctor(&d, "cpu");
    expect(&d, "shards.rescored.kl", RT_CHECK_PASS, "15 rows of 3 sequences");
    close_doctor(&d);
    struct rt_err err = {0};
    const char *const args[] = {"--teacher", CASE, "--data", ids_file(), "--out", test_tmp("no-logits"), "--cache", "topk=0", "--features", "1",
                                "--memory", "400M", "--device", "cpu", NULL};
    assert_ok(test_command(&rt_cmd_logits, args, &err));
    d = (struct rt_doctor){.shards = args[5], .rescore = 8};
    doctor(&d, "cpu");
    expect(&d, "shards.rescored", RT_CHECK_WARN, "holds no logits");
    close_doctor(&d);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(sound_rows_pass),
    cmocka_unit_test(wrong_rows_fail),
    cmocka_unit_test(rows_of_a_damaged_checkpoint_fail),
    cmocka_unit_test(scales_of_powers_of_two),
    cmocka_unit_test(what_is_left_out_is_said),
};
RT_SUITE(doctor_rescore, tests)
