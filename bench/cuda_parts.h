/* A bench of the GPU whose arguments name the parts to be run; without one, all. */
#ifndef RT_BENCH_CUDA_PARTS_H
#define RT_BENCH_CUDA_PARTS_H

#include <stdio.h>
#include <string.h>

#include "core/backend.h"

/* Whether this part was asked for. list ends with NULL. */
static inline bool bench_wanted(char *const *list, const char *part)
{
    bool found = *list == NULL;
    for (; *list != NULL && !found; list++)
        found = strcmp(*list, part) == 0;
    return found;
}

/* main: opens the GPU, names it, runs. Without one it says so and is no failure. */
static inline int bench_cuda_main(const char *name, enum rt_status (*run)(const struct rt_device *d, char *const *list, struct rt_err *err), int argc,
                                  char **argv)
{
    struct rt_err err = {0};
    struct rt_device d = {0};
    char why[160];
    if (!rt_backend_cuda.available(why, sizeof why)) {
        printf("%s\n", why);
        return 0;
    }
    if (rt_device_open(&rt_backend_cuda, &(struct rt_dev_options){0}, &d, &err) == RT_OK) {
        printf("%s\n", d.be->describe(d.dev));
        (void)run(&d, argv + (argc > 0), &err);
    }
    rt_device_close(&d);
    if (err.status != RT_OK)
        fprintf(stderr, "%s: %s\n", name, err.msg);
    return rt_exit_code(err.status);
}

#endif
