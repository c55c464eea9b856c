/* The first inputs of every fuzz target, always the same ones; `make fuzz` goes on from there. */
#include "tests/suite.h"

#include <stdlib.h>
#include <string.h>

#include "tests/fuzz.h"

static void damaged_files(void **state)
{
    (void)state;
    for (int i = 0; fuzz_targets[i] != NULL; i++) {
        int64_t done;
        const char *bad = fuzz_run(fuzz_targets[i], 0, fuzz_targets[i]->iterations, 0, &done);
        if (bad != NULL)
            fail_msg("%s; again: retort-tests --fuzz %s 0 NUMBER", bad, fuzz_targets[i]->name);
    }
}

/* ---- the fuzzer itself notices ---- */
static void faulty_begin(struct fuzz_seeds *s)
{
    fuzz_seed(s, "8 bytes, no more", 16);
}

static enum rt_status takes_what_it_reads(const uint8_t *data, size_t n, struct rt_err *err)
{
    void *volatile p = calloc(1, n > 4 && data[0] > '8' ? (size_t)data[0] << 20 : 1); /* volatile: or the compiler saves itself the pair */
    free(p);
    return n == 16 && data[0] == '8' ? RT_OK : rt_fail(err, RT_FORMAT, "refused");
}

static enum rt_status says_nothing(const uint8_t *data, size_t n, struct rt_err *err)
{
    (void)err;
    return n > 0 && data[0] != '8' ? RT_FORMAT : RT_OK;
}

static enum rt_status runs_out(const uint8_t *data, size_t n, struct rt_err *err)
{
    return n > 0 && data[0] != '8' ? rt_fail(err, RT_NOMEM, "no memory") : RT_OK;
}

static void notices(void **state)
{
    (void)state;
    static const struct {
        enum rt_status (*run)(const uint8_t *, size_t, struct rt_err *);
        const char *says;
    } faulty[] = {{takes_what_it_reads, "one allocation"}, {says_nothing, "without a message"}, {runs_out, "no memory"}};
    for (size_t i = 0; i < 3; i++) {
        const struct fuzz_target t = {"faulty", 2000, NULL, 0, faulty_begin, NULL, faulty[i].run, NULL};
        int64_t done;
        const char *bad = fuzz_run(&t, 0, 2000, 0, &done);
        assert_non_null(bad);
        assert_non_null(strstr(bad, faulty[i].says));
        assert_true(done < 2000);
    }
}

static const struct CMUnitTest tests[] = {cmocka_unit_test(damaged_files), cmocka_unit_test(notices)};
RT_SUITE(fuzz, tests)
