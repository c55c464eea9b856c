#include "distill/train_local.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/mem.h"
#include "core/net.h"

static const char program[] = "/proc/self/exe";
static const double end_seconds = 10, kill_seconds = 15; /* after a rank failed */

struct local {
    pid_t *pid; /* [n], 0: has ended */
    int n, left;
    int failed; /* the rank that says most about the end; -1: none failed */
    int code;   /* its exit code; 0: a signal ended it */
    int signal;
};

/* The arguments as this process was started with: program, command, options. count [16] is kept by the caller. */
static enum rt_status arguments(const struct rt_context *ctx, int threads, char count[16], char ***out, struct rt_err *err)
{
    char **argv;
    const enum rt_status st = rt_alloc((size_t)ctx->argc + 5, sizeof *argv, "arguments", &argv, err);
    if (st != RT_OK)
        return st;
    argv[0] = (char *)(uintptr_t) "retort";
    argv[1] = (char *)(uintptr_t)ctx->command->name;
    for (int i = 0; i < ctx->argc; i++)
        argv[i + 2] = ctx->argv[i];
    if (threads > 0) {
        snprintf(count, 16, "%d", threads);
        argv[ctx->argc + 2] = (char *)(uintptr_t) "--threads";
        argv[ctx->argc + 3] = count;
    }
    *out = argv;
    return RT_OK;
}

static enum rt_status set_number(const char *name, int value, struct rt_err *err)
{
    char text[16];
    snprintf(text, sizeof text, "%d", value);
    return setenv(name, text, 1) == 0 ? RT_OK : rt_fail_errno(err, "environment variable %s", name);
}

static enum rt_status start(struct local *l, char **argv, int port, struct rt_err *err)
{
    enum rt_status st;
    const pid_t parent = getpid();
    RT_TRY(set_number("WORLD_SIZE", l->n, err));
    RT_TRY(set_number("MASTER_PORT", port, err));
    if (setenv("MASTER_ADDR", "127.0.0.1", 1) != 0 || unsetenv("TORCHELASTIC_USE_AGENT_STORE") != 0)
        RT_TRY(rt_fail_errno(err, "environment variable MASTER_ADDR"));
    for (int i = 0; i < l->n; i++) {
        RT_TRY(set_number("RANK", i, err));
        RT_TRY(set_number("LOCAL_RANK", i, err));
        fflush(NULL);
        l->pid[i] = fork();
        if (l->pid[i] < 0) {
            l->pid[i] = 0;
            RT_TRY(rt_fail_errno(err, "cannot start rank %d", i));
        }
        if (l->pid[i] == 0) { /* a group of its own: the terminal's interrupt reaches the parent alone, which passes it on */
            (void)setpgid(0, 0);
            (void)prctl(PR_SET_PDEATHSIG, SIGTERM);
            if (getppid() == parent)
                execv(program, argv);
            _exit(127);
        }
        l->left++;
    }
out:
    return st;
}

static void signal_all(const struct local *l, int sig)
{
    for (int i = 0; i < l->n; i++)
        if (l->pid[i] > 0)
            (void)kill(l->pid[i], sig);
}

/* What an end tells: that a rank saved and stopped less than that it lost another one (1), and that less than what the lost one says. */
static int weight(int code, int sig)
{
    return code == 0 && sig == 0 ? 0 : code == rt_exit_code(RT_INTERRUPTED) ? 1 : code == 1 ? 2 : 3;
}

/* Takes note of ranks that have ended. */
static void collect(struct local *l)
{
    for (int i = 0; i < l->n; i++) {
        int how;
        if (l->pid[i] == 0 || waitpid(l->pid[i], &how, WNOHANG) != l->pid[i])
            continue;
        const int code = WIFEXITED(how) ? WEXITSTATUS(how) : 0, sig = WIFEXITED(how) ? 0 : WTERMSIG(how);
        l->pid[i] = 0;
        l->left--;
        if (weight(code, sig) > weight(l->code, l->signal)) {
            l->failed = i;
            l->code = code;
            l->signal = sig;
        }
    }
}

static void wait_all(struct rt_context *ctx, struct local *l)
{
    bool passed_on = false, ended = false;
    double since = 0;
    while (l->left > 0) {
        usleep(20000);
        collect(l);
        if (!passed_on && ctx->stop != NULL && ctx->stop(ctx->stop_self)) {
            passed_on = true;
            signal_all(l, SIGINT);
        }
        if (l->failed < 0 || l->code == rt_exit_code(RT_INTERRUPTED)) /* who stops and saves may take his time */
            continue;
        since = since > 0 ? since : rt_now();
        if (rt_now() - since > kill_seconds)
            signal_all(l, SIGKILL);
        else if (!ended && rt_now() - since > end_seconds) {
            ended = true;
            signal_all(l, SIGTERM);
        }
    }
}

/* A status whose exit code is `code`. */
static enum rt_status status_of(int code)
{
    for (int s = RT_OK + 1; s < RT_STATUS_COUNT; s++)
        if (rt_exit_code((enum rt_status)s) == code)
            return (enum rt_status)s;
    return RT_IO;
}

enum rt_status rt_train_local(struct rt_context *ctx, int n, int threads, struct rt_err *err)
{
    enum rt_status st;
    struct local l = {.n = n, .failed = -1};
    char **argv = NULL, count[16];
    int port, fd = -1;
    if (access(program, X_OK) != 0)
        return rt_fail(err, RT_USAGE, "--gpus %d: this program cannot start itself (%s: %s); start %d ranks with torchrun, mpirun or srun", n, program,
                       strerror(errno), n);
    RT_TRY(rt_alloc((size_t)n, sizeof *l.pid, "ranks", &l.pid, err));
    RT_TRY(arguments(ctx, threads, count, &argv, err));
    RT_TRY(rt_net_listen(0, &fd, &port, err)); /* a port that is free; rank 0 takes it */
    rt_net_close(fd);
    st = start(&l, argv, port, err);
    if (st != RT_OK)
        signal_all(&l, SIGKILL);
    wait_all(ctx, &l);
    RT_TRY(st);
    if (l.failed >= 0 && l.code == rt_exit_code(RT_INTERRUPTED))
        RT_FAIL(err, INTERRUPTED, "interrupted: the ranks say above what they saved, the same command goes on");
    if (l.failed >= 0 && l.signal > 0)
        RT_FAIL(err, IO, "rank %d of %d was ended by signal %d", l.failed, n, l.signal);
    if (l.failed >= 0) {
        st = status_of(l.code);
        rt_fail(err, st, "rank %d of %d ended first, with exit code %d; it says above why", l.failed, n, l.code);
    }
out:
    rt_free(l.pid);
    rt_free(argv);
    return st;
}
