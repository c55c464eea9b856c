/* A command of the program inside the test binary. */
#ifndef RT_TESTS_RUN_COMMAND_H
#define RT_TESTS_RUN_COMMAND_H

#include "distill/command.h"

/* Tests hold on every machine, with a GPU or without: `auto` is the CPU. */
void test_on_cpu(struct rt_common *common);
/* How a command is stopped, and where what it says goes. Questions whether to stop count from 1; 0: none of them. */
struct test_run {
    int stop_at, kill_at; /* the question from which on the answer is yes; the one in which SIGKILL comes */
    const char *block;    /* a file that is made when it stops: no checkpoint can take that name; NULL: none */
    const char *prints;   /* the file that takes what it prints; NULL: /dev/null */
    char **logged;        /* *logged = what it logged, to be freed; NULL: not wanted */
};
/* Parses args (NULL at the end, at most 63) and runs the command, on the CPU unless --device says otherwise. */
enum rt_status test_command_with(const struct rt_command *command, const char *const *args, const struct test_run *run, struct rt_err *err);
/* The same, never stopped; what it prints and logs goes nowhere. */
enum rt_status test_command(const struct rt_command *command, const char *const *args, struct rt_err *err);
/* The same with two of test_run's members. */
enum rt_status test_command_logged(const struct rt_command *command, const char *const *args, int stop_at, char **logged, struct rt_err *err);

#endif
