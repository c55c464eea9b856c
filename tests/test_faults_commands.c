/* Memory runs out at each allocation in turn: whole commands, from their arguments to their output directory. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/io.h"
#include "tests/faults.h"
#include "tests/run_command.h"

#define CASES "tests/data/cases/"

struct command_case {
    const struct rt_command *command;
    const char *args[24]; /* NULL at the end */
    const char *result;   /* file of the output directory that makes the digest; NULL: no --out */
    int runs;             /* each with a directory of its own */
};

static enum rt_status command_work(void *ctx, uint64_t *digest, struct rt_err *err)
{
    struct command_case *c = ctx;
    const char *args[32];
    char name[64], out[512], path[1024], bytes[4096];
    int n = 0;
    snprintf(name, sizeof name, "fault-%s-%d", c->command->name, c->runs++);
    snprintf(out, sizeof out, "%s", test_tmp(name));
    for (; c->args[n] != NULL; n++)
        args[n] = c->args[n];
    if (c->result != NULL) {
        args[n++] = "--out";
        args[n++] = out;
    }
    args[n] = NULL;
    const enum rt_status st = test_command(c->command, args, err);
    if (st == RT_OK && c->result != NULL) {
        snprintf(path, sizeof path, "%s/%s", out, c->result);
        const int fd = open(path, O_RDONLY);
        for (ssize_t k; (k = read(fd, bytes, sizeof bytes)) > 0;)
            fault_digest(digest, bytes, (size_t)k);
        close(fd);
    }
    return st;
}

/* A file with this text; its path stays (test_tmp's ring comes round). */
static const char *file_of(const char *name, const char *text)
{
    static char paths[4][512];
    static int n;
    struct rt_err err = {0};
    char *path = paths[n++ % 4];
    snprintf(path, sizeof paths[0], "%s", test_tmp(name));
    assert_ok(rt_publish_bytes(path, text, strlen(text), &err));
    return path;
}

static const char *ids_file(void)
{
    static const char lines[] = "{\"input_ids\": [1, 2, 3, 4, 5, 6, 7, 8]}\n{\"input_ids\": [9, 8, 7, 6], \"loss_mask\": [0, 0, 1, 1]}\n"
                                "{\"input_ids\": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]}\n";
    return file_of("fault-ids.jsonl", lines);
}

static void logits(void **state)
{
    (void)state;
    struct command_case c = {&rt_cmd_logits,
                             {"--teacher", CASES "v3_fp8", "--data", ids_file(), "--cache", "topk=4", "--features", "1,final:4", "--rows-per-shard",
                              "8", "--window", "16", "--threads", "2", "--memory", "200M"},
                             "manifest.jsonl", 0};
    fault_each(command_work, &c, 40);
}

static void train(void **state)
{
    (void)state;
    struct command_case c = {&rt_cmd_train,
                             {"--student", CASES "qwen3", "--data", ids_file(), "--steps", "2", "--batch-tokens", "16", "--max-length", "16",
                              "--save-every", "1", "--threads", "2", "--memory", "200M"},
                             "model/model.safetensors", 0};
    fault_each(command_work, &c, 30);
}

static void eval(void **state)
{
    (void)state;
    struct command_case c = {&rt_cmd_eval, {"--student", CASES "qwen3", "--data", ids_file(), "--threads", "2", "--memory", "200M", "--json"}, NULL, 0};
    fault_each(command_work, &c, 40);
}

static void filter(void **state)
{
    (void)state;
    static const char lines[] = "{\"prompt\": \"1+1?\", \"completion\": \"<think>\\n1</think>\\\\boxed{2}\", \"answer\": \"2\"}\n"
                                "{\"prompt\": \"1+2?\", \"completion\": \"\\\\boxed{4}\", \"answer\": \"3\"}\n";
    struct command_case c = {&rt_cmd_filter, {"--data", file_of("fault-traces.jsonl", lines), "--verify", "boxed"}, "accepted.jsonl", 0};
    fault_each(command_work, &c, 60);
}

static void traces(void **state)
{
    (void)state;
    static const char line[] = "{\"prompt\": \"Add 62 and 41.\", \"answer\": \"103\"}\n";
    struct command_case c = {&rt_cmd_traces,
                             {"--teacher", "examples/tiny_teacher", "--prompts", file_of("fault-prompts.jsonl", line), "--samples", "2", "--max-tokens", "4", "--threads", "2", "--memory", "300M"},
                             "traces.jsonl", 0};
    fault_each(command_work, &c, 8); /* the tiny teacher's nine megabytes are read each time */
}

static void inspect(void **state)
{
    (void)state;
    static const char *const what[] = {CASES "v3_fp8", CASES "qwen3", "examples/tiny_student/tokenizer.json", "examples/prompts/arithmetic_eval.jsonl"};
    for (size_t i = 0; i < sizeof what / sizeof *what; i++) {
        struct command_case c = {&rt_cmd_inspect, {what[i], "--json"}, NULL, 0};
        fault_each(command_work, &c, 20);
    }
}

static const struct CMUnitTest tests[] = {cmocka_unit_test(logits), cmocka_unit_test(train), cmocka_unit_test(eval), cmocka_unit_test(filter),
                                          cmocka_unit_test(traces), cmocka_unit_test(inspect)};
RT_SUITE(faults_commands, tests)
