/* Fuzz targets: commands that read what others wrote. */
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "tests/fuzz.h"
#include "tests/run_command.h"
#include "tests/suite.h"

#define CASES "tests/data/cases/"

static const char *const file_words[] = {"{\"model_type\": \"deepseek_v3\"", "{\"model\":", "\"added_tokens\": []", "{\"text\":", "\x86\xa6", "format", "retort-rows",
                                         "{\"version\":1", "\"vocab_size\": 0", "\"prompt\":", "\n", NULL};

static void inspect_begin(struct fuzz_seeds *s)
{
    static const char line[] = "{\"prompt\": \"1+1?\", \"completion\": \"2\"}\n{\"input_ids\": [1, 2]}\n";
    fuzz_dir("fuzz-inspect");
    fuzz_seed(s, line, sizeof line - 1);
    fuzz_seed_file(s, CASES "v3_fp8/config.json");
    fuzz_seed_file(s, CASES "qwen3/config.json");
    fuzz_seed_file(s, "tests/data/tokenizers/qwen/tokenizer.json");
}

static enum rt_status inspect_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    fuzz_put(fuzz_at("config.json"), data, n);
    const char *const args[] = {fuzz_at("config.json"), n % 2 == 0 ? "--json" : "--tensors", NULL};
    return test_command(&rt_cmd_inspect, args, err);
}

/* Two runs of two steps, of which the target damages a file. */
static void make_runs(const char *dir)
{
    static const char lines[] = "{\"input_ids\": [1, 2, 3, 4, 5, 6, 7, 8]}\n{\"input_ids\": [9, 8, 7, 6]}\n";
    struct rt_err err = {0};
    fuzz_dir(dir);
    fuzz_put(fuzz_at("lines.jsonl"), (const uint8_t *)lines, sizeof lines - 1);
    for (int i = 0; i < 2; i++) {
        const char *const args[] = {"--student", CASES "qwen3", "--data", fuzz_at("lines.jsonl"), "--eval-data", fuzz_at("lines.jsonl"), "--steps", "2",
                                    "--batch-tokens", "16", "--max-length", "16", "--threads", "1", "--memory", "200M", "--seed", i == 0 ? "0" : "1",
                                    "--out", fuzz_at(i == 0 ? "a" : "b"), NULL};
        fuzz_must(test_command(&rt_cmd_train, args, &err), &err);
    }
}

static void record_begin(struct fuzz_seeds *s)
{
    make_runs("fuzz-record");
    fuzz_seed_file(s, fuzz_at("a/run.json"));
}

static enum rt_status record_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    fuzz_put(fuzz_at("a/run.json"), data, n);
    const char *const both[] = {fuzz_at("a"), fuzz_at("b"), "--json", NULL}, *const one[] = {fuzz_at("a"), "--json", NULL};
    enum rt_status st = test_command(&rt_cmd_inspect, one, err);
    if (st == RT_OK)
        st = test_command(&rt_cmd_compare, both, err);
    return st;
}

static const char *const metric_words[] = {"\"step\":", "\"loss\":null", "1e400", "\n", "{}", "{\"step\":1}", "-1", "[]", NULL};

static void metrics_begin(struct fuzz_seeds *s)
{
    make_runs("fuzz-metrics");
    fuzz_seed_file(s, fuzz_at("a/metrics.jsonl"));
}

static enum rt_status metrics_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    fuzz_put(fuzz_at("a/metrics.jsonl"), data, n);
    const char *const both[] = {fuzz_at("a"), fuzz_at("b"), "--json", NULL};
    return test_command(&rt_cmd_compare, both, err);
}

const struct fuzz_target fuzz_inspect = {"inspect", 300, file_words, FUZZ_READER + FUZZ_IDS, inspect_begin, NULL, inspect_run, NULL};
const struct fuzz_target fuzz_record = {"record", 300, metric_words, FUZZ_READER, record_begin, NULL, record_run, NULL};
const struct fuzz_target fuzz_metrics = {"metrics", 300, metric_words, FUZZ_READER, metrics_begin, NULL, metrics_run, NULL};
