#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/cuda/cuda.h"

enum { PATH = 1024 };

static void *try_names(const char *place, const char *const *names)
{
    for (const char *const *name = names; *name != NULL; name++) {
        char path[PATH];
        if (snprintf(path, sizeof path, "%s%s", place, *name) >= PATH)
            continue;
        void *lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (lib != NULL)
            return lib;
    }
    return NULL;
}

/* lib and lib64 of what the environment says is an installation. */
static void *try_homes(const char *const *names)
{
    static const char *const homes[] = {"NCCL_HOME", "CUDA_HOME", "CUDA_PATH"}, *const folders[] = {"lib", "lib64"};
    void *lib = NULL;
    for (size_t h = 0; h < sizeof homes / sizeof *homes && lib == NULL; h++)
        for (size_t f = 0; f < 2 && lib == NULL; f++) {
            const char *home = getenv(homes[h]);
            char place[PATH];
            if (home != NULL && home[0] != '\0' && snprintf(place, sizeof place, "%s/%s/", home, folders[f]) < PATH)
                lib = try_names(place, names);
        }
    return lib;
}

/* Beside a cuBLASLt that is open: in its folder, or where Python's packages put their libraries. */
static void *try_beside(const char *const *names)
{
    static const char *const known[] = {"libcublasLt.so.13", "libcublasLt.so.12"}, *const ways[] = {"", "../../nccl/lib/", "../../cudnn/lib/"};
    void *lib = NULL;
    for (size_t k = 0; k < sizeof known / sizeof *known && lib == NULL; k++) {
        void *open = dlopen(known[k], RTLD_NOW | RTLD_NOLOAD);
        Dl_info where = {0};
        char place[PATH];
        if (open == NULL)
            continue;
        void *symbol = dlsym(open, "cublasLtGetVersion");
        const char *slash = symbol != NULL && dladdr(symbol, &where) != 0 && where.dli_fname != NULL ? strrchr(where.dli_fname, '/') : NULL;
        for (size_t w = 0; slash != NULL && w < sizeof ways / sizeof *ways && lib == NULL; w++)
            if (snprintf(place, sizeof place, "%.*s/%s", (int)(slash - where.dli_fname), where.dli_fname, ways[w]) < PATH)
                lib = try_names(place, names);
        (void)dlclose(open);
    }
    return lib;
}

void *rt_cuda_dlopen(const char *const *names)
{
    static const char *const places[] = {"/usr/local/cuda/lib64/", "/usr/local/cuda/lib/", "/usr/lib/x86_64-linux-gnu/", "/usr/lib/aarch64-linux-gnu/"};
    void *lib = try_names("", names);
    if (lib == NULL)
        lib = try_homes(names);
    for (size_t p = 0; p < sizeof places / sizeof *places && lib == NULL; p++)
        lib = try_names(places[p], names);
    return lib != NULL ? lib : try_beside(names);
}
