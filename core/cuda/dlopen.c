#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>

#include "core/cuda/cuda.h"

void *rt_cuda_dlopen(const char *const *names)
{
    static const char *const places[] = {"", "/usr/local/cuda/lib64/", "/usr/local/cuda/lib/", "/usr/lib/x86_64-linux-gnu/",
                                         "/usr/lib/aarch64-linux-gnu/"};
    for (size_t p = 0; p < sizeof places / sizeof *places; p++)
        for (const char *const *name = names; *name != NULL; name++) {
            char path[256];
            snprintf(path, sizeof path, "%s%s", places[p], *name);
            void *lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
            if (lib != NULL)
                return lib;
        }
    return NULL;
}
