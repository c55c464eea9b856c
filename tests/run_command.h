/* A command of the program inside the test binary. */
#ifndef RT_TESTS_RUN_COMMAND_H
#define RT_TESTS_RUN_COMMAND_H

#include "distill/command.h"

/* Parses args (NULL at the end, at most 63) and runs the command; what it prints goes nowhere. */
enum rt_status test_command(const struct rt_command *command, const char *const *args, struct rt_err *err);

#endif
