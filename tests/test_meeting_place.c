/* Where ranks meet, by the variables of their launcher. */
#include <stdlib.h>

#include "core/rank.h"
#include "tests/suite.h"

static const struct {
    const char *list, *host;
} lists[] = {
    {"gpu7", "gpu7"}, {"gpu7,gpu9", "gpu7"}, {"gpu[003-010,012],x", "gpu003"}, {"n[5]", "n5"}, {"n[5,7]", "n5"}, {"", NULL}, {"n[", NULL}, {"n[]", NULL}, {",x", NULL},
};

static void test_meeting_place(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const struct rt_rank rank = {1, 4, 1};
    char host[RT_RANK_HOST];
    int port;
    static const char *const names[] = {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST",
                                        "SLURM_NODELIST", "OMPI_COMM_WORLD_LOCAL_SIZE"};
    for (size_t i = 0; i < sizeof lists / sizeof lists[0]; i++) {
        assert_true(rt_rank_first_host(lists[i].list, host) == (lists[i].host != NULL));
        if (lists[i].host != NULL)
            assert_string_equal(host, lists[i].host);
    }
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        unsetenv(names[i]);
    assert_status(rt_rank_meeting(&rank, host, &port, &err), USAGE);
    setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4", 1);
    assert_ok(rt_rank_meeting(&rank, host, &port, &err));
    assert_string_equal(host, "127.0.0.1");
    assert_int_equal(port, 29500);
    setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "2", 1);
    assert_status(rt_rank_meeting(&rank, host, &port, &err), USAGE);
    setenv("SLURM_PROCID", "1", 1);
    setenv("SLURM_JOB_ID", "7000123", 1);
    setenv("SLURM_STEP_NODELIST", "a[2-3]", 1);
    assert_ok(rt_rank_meeting(&rank, host, &port, &err));
    assert_string_equal(host, "a2");
    assert_int_equal(port, 29623);
    setenv("SLURM_JOB_ID", "4294966987", 1); /* 32 bits and no sign */
    assert_ok(rt_rank_meeting(&rank, host, &port, &err));
    assert_int_equal(port, 30487);
    setenv("SLURM_JOB_ID", "12x", 1);
    assert_status(rt_rank_meeting(&rank, host, &port, &err), USAGE);
    setenv("MASTER_ADDR", "head", 1);
    setenv("MASTER_PORT", "4000", 1);
    assert_ok(rt_rank_meeting(&rank, host, &port, &err));
    assert_string_equal(host, "head");
    assert_int_equal(port, 4000);
    setenv("TORCHELASTIC_USE_AGENT_STORE", "True", 1);
    assert_ok(rt_rank_meeting(&rank, host, &port, &err));
    assert_int_equal(port, 4001);
    setenv("MASTER_PORT", "70000", 1);
    assert_status(rt_rank_meeting(&rank, host, &port, &err), USAGE);
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        unsetenv(names[i]);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_meeting_place),
};
RT_SUITE(meeting_place, tests)
