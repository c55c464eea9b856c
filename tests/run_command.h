/* A command of the program inside the test binary. */
#ifndef RT_TESTS_RUN_COMMAND_H
#define RT_TESTS_RUN_COMMAND_H

#include "distill/command.h"

/* Tests hold on every machine, with a GPU or without: `auto` is the CPU. */
void test_on_cpu(struct rt_common *common);
/* Parses args (NULL at the end, at most 63) and runs the command, on the CPU unless --device says otherwise; what it prints goes nowhere. */
enum rt_status test_command(const struct rt_command *command, const char *const *args, struct rt_err *err);
/* The same; *logged (NULL is fine) is what it logged, to be freed. stop_at: the question in which it is asked to stop, 0: never. */
enum rt_status test_command_logged(const struct rt_command *command, const char *const *args, int stop_at, char **logged, struct rt_err *err);

#endif
