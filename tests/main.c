/* The test runner: all suites, or those named; one count at the end. */
#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/suite.h"

#define RT_SUITE_ENTRY(name) extern const struct rt_suite rt_suite_##name;
#include "suites.inc"
#undef RT_SUITE_ENTRY

static const struct rt_suite *const suites[] = {
#define RT_SUITE_ENTRY(name) &rt_suite_##name,
#include "suites.inc"
#undef RT_SUITE_ENTRY
};
enum { N_SUITES = sizeof suites / sizeof suites[0] };

int rt_oracle_main(int argc, char **argv); /* tests/oracle.c */
int rt_fuzz_main(int argc, char **argv);   /* tests/fuzz.c */

static char tmp_root[64];
static const char *suite_running = "";
static size_t skipped;

void test_skipped(const char *reason)
{
    skipped++;
    print_message("SKIP %s\n", reason);
}

const char *test_tmp(const char *name)
{
    static char ring[16][512];
    static int at;
    char *out = ring[at++ % 16];
    if (tmp_root[0] == '\0') {
        strcpy(tmp_root, "/tmp/retort-tests-XXXXXX");
        if (mkdtemp(tmp_root) == NULL) {
            perror("mkdtemp");
            exit(1);
        }
    }
    /* a folder a suite: names of one are not in another's way */
    snprintf(out, sizeof ring[0], "%s/%s", tmp_root, suite_running);
    if (mkdir(out, 0755) != 0 && errno != EEXIST) {
        perror(out);
        exit(1);
    }
    snprintf(out, sizeof ring[0], "%s/%s/%s", tmp_root, suite_running, name);
    return out;
}

const char *test_data(const char *name)
{
    return name; /* the runner is started from the repository root */
}

double test_rel_error(const float *a, const float *b, int64_t n)
{
    double num = 0, den = 0;
    for (int64_t i = 0; i < n; i++) {
        const double d = (double)a[i] - b[i];
        num += d * d;
        den += (double)b[i] * b[i];
    }
    if (isnan(num) || isnan(den))
        return INFINITY;
    return den > 0 ? sqrt(num / den) : sqrt(num);
}

static int wanted(const char *suite, const char *test, int argc, char **argv)
{
    if (argc <= 1)
        return 1;
    for (int i = 1; i < argc; i++) {
        const size_t n = strlen(suite);
        if (strncmp(argv[i], suite, n) == 0 && (argv[i][n] == '\0' || (argv[i][n] == '.' && !strcmp(argv[i] + n + 1, test))))
            return 1;
    }
    return 0;
}

static void clean_up(void)
{
    if (tmp_root[0] != '\0') {
        char cmd[128];
        snprintf(cmd, sizeof cmd, "rm -rf '%s'", tmp_root);
        if (system(cmd) != 0)
            fprintf(stderr, "could not remove %s\n", tmp_root);
    }
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "--oracle") == 0)
        return rt_oracle_main(argc - 1, argv + 1);
    if (argc > 1 && strcmp(argv[1], "--fuzz") == 0) {
        const int rc = rt_fuzz_main(argc - 1, argv + 1);
        clean_up();
        return rc;
    }
    if (argc > 1 && strcmp(argv[1], "--list") == 0) {
        for (int s = 0; s < N_SUITES; s++)
            for (size_t t = 0; t < suites[s]->n; t++)
                printf("%s.%s\n", suites[s]->name, suites[s]->tests[t].name);
        return 0;
    }
    size_t ran = 0, failed = 0;
    skipped = 0;
    for (int s = 0; s < N_SUITES; s++) {
        struct CMUnitTest *run = calloc(suites[s]->n + 1, sizeof *run);
        size_t n = 0;
        for (size_t t = 0; run != NULL && t < suites[s]->n; t++)
            if (wanted(suites[s]->name, suites[s]->tests[t].name, argc, argv))
                run[n++] = suites[s]->tests[t];
        suite_running = suites[s]->name;
        if (n > 0) {
            const int bad = _cmocka_run_group_tests(suites[s]->name, run, n, NULL, NULL);
            ran += n;
            failed += bad < 0 ? n : (size_t)bad;
        }
        free(run);
    }
    clean_up();
    if (ran == 0) {
        fprintf(stderr, "no test of this name; --list names them\n");
        return 2;
    }
    if (skipped > 0)
        printf("%zu skipped: see the lines SKIP\n", skipped);
    printf("%zu passed, %zu failed\n", ran - failed - skipped, failed);
    return failed != 0;
}
