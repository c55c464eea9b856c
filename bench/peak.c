/* Runs a command and tells, on stderr as its last line, what it took:  peak_kib=N wall_s=X cpu_s=Y
 *
 *     bench_peak COMMAND [ARGUMENT ...]          ends with the command's exit status
 *
 * peak_kib is the greatest resident set of the process (getrusage), page cache not counted.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/log.h"

static double seconds(struct timeval t)
{
    return (double)t.tv_sec + (double)t.tv_usec * 1e-6;
}

int main(int argc, char **argv)
{
    struct rusage u;
    int status;
    const double t0 = rt_now();
    if (argc < 2) {
        fprintf(stderr, "bench_peak COMMAND [ARGUMENT ...]\n");
        return 2;
    }
    const pid_t child = fork();
    if (child == 0) {
        execvp(argv[1], argv + 1);
        fprintf(stderr, "bench_peak: %s: %s\n", argv[1], strerror(errno));
        _exit(127);
    }
    if (child < 0 || wait4(child, &status, 0, &u) != child) {
        fprintf(stderr, "bench_peak: %s\n", strerror(errno));
        return 1;
    }
    fprintf(stderr, "peak_kib=%ld wall_s=%.2f cpu_s=%.2f\n", u.ru_maxrss, rt_now() - t0, seconds(u.ru_utime) + seconds(u.ru_stime));
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
