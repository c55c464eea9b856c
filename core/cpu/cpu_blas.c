/* OpenBLAS: the products on the calling thread, and what has to be settled before the first of them. */
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "core/cpu/cpu.h"
#include "core/mem.h"

/* OpenBLAS's own header, not another BLAS's; last, since it brings in <complex.h> and its macro I. */
#if __has_include(<openblas-pthread/cblas.h>)
#include <openblas-pthread/cblas.h>
#elif __has_include(<openblas/cblas.h>)
#include <openblas/cblas.h>
#else
#include <cblas.h>
#endif

/* OpenBLAS chooses its kernels when it is loaded, by processor model; a release older than the processor falls back to SSE3
 * kernels, a quarter of the speed or less. Its own initialiser, called again with a named core type, corrects that. */
extern void gotoblas_dynamic_quit(void) __attribute__((weak));
extern void gotoblas_dynamic_init(void) __attribute__((weak));

const char *rt_cpu_blas_core(void)
{
    return openblas_get_corename();
}

static const char *better_core(void)
{
#if defined(__x86_64__)
    static const char *const wide[] = {"Haswell", "Zen", "SkylakeX", "Cooperlake", "SapphireRapids"};
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++)
        if (strcasecmp(rt_cpu_blas_core(), wide[i]) == 0)
            return NULL;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return "SkylakeX";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return "Haswell";
#endif
    return NULL;
}

static void choose_core(void)
{
    static const char name[] = "OPENBLAS_CORETYPE";
    const char *core = better_core();
    if (core == NULL || gotoblas_dynamic_quit == NULL || gotoblas_dynamic_init == NULL || getenv(name) != NULL)
        return;
    if (setenv(name, core, 1) != 0)
        return;
    gotoblas_dynamic_quit();
    gotoblas_dynamic_init();
    unsetenv(name);
}

/* A product of small integers is exact in float32, so any difference is a wrong kernel. 160^3 is past the bound below which
 * OpenBLAS takes kernels for small products that need no buffer. */
enum { CHECK_BIG = 160, CHECK_SMALL = 37 };

static void fill(float *x, int n, unsigned step)
{
    for (int i = 0; i < n; i++)
        x[i] = (float)((int)((unsigned)i * step % 17) - 8);
}

static bool check(int m, int n, int k, float *a, float *b, float *c)
{
    fill(a, m * k, 7);
    fill(b, n * k, 11);
    rt_cpu_gemm_nt(m, n, k, 1, a, k, b, k, 0, c, n);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            float sum = 0;
            for (int p = 0; p < k; p++)
                sum += a[i * k + p] * b[j * k + p];
            if (c[i * n + j] != sum)
                return false;
        }
    return true;
}

struct check_job {
    float *scratch; /* of each item */
    bool *good;
};

static void check_item(void *ctx, int64_t item, __attribute__((unused)) int worker)
{
    const struct check_job *job = ctx;
    float *a = job->scratch + item * 3 * CHECK_BIG * CHECK_BIG, *b = a + CHECK_BIG * CHECK_BIG, *c = b + CHECK_BIG * CHECK_BIG;
    job->good[item] = check(CHECK_BIG, CHECK_BIG, CHECK_BIG, a, b, c) && check(CHECK_SMALL, CHECK_SMALL + 1, CHECK_SMALL + 2, a, b, c);
}

/* OpenBLAS keeps a buffer for each product that is under way, and asks for a new one without end where there is no memory for it. */
extern void *blas_memory_alloc(int place) __attribute__((weak));
extern void blas_memory_free(void *buffer) __attribute__((weak));

/* Has it take n of them now, all at once: products of the check may run one after the other. */
static enum rt_status reserve_buffers(int n, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    void **held = NULL;
    if (blas_memory_alloc == NULL || blas_memory_free == NULL)
        return RT_OK;
    RT_TRY(rt_alloc((size_t)n, sizeof *held, "buffers of OpenBLAS", &held, err));
    for (int i = 0; i < n; i++)
        held[i] = blas_memory_alloc(0);
    for (int i = 0; i < n; i++)
        if (held[i] != NULL)
            blas_memory_free(held[i]);
out:
    rt_free(held);
    return st;
}

enum rt_status rt_cpu_blas_setup(struct rt_pool *pool, struct rt_err *err)
{
    enum rt_status st;
    struct check_job job = {0};
    const int items = rt_pool_threads(pool);

    choose_core();
    openblas_set_num_threads(1);
    RT_TRY(reserve_buffers(items, err));
    RT_TRY(rt_alloc((size_t)items * 3 * CHECK_BIG * CHECK_BIG, sizeof *job.scratch, "the check of OpenBLAS", &job.scratch, err));
    RT_TRY(rt_alloc((size_t)items, sizeof *job.good, "the check of OpenBLAS", &job.good, err));
    rt_pool_run(pool, items, check_item, &job);
    for (int i = 0; i < items; i++)
        if (!job.good[i])
            RT_FAIL(err, DEVICE, "OpenBLAS multiplies wrongly with its kernels for '%s'; set OPENBLAS_CORETYPE to another core type, "
                    "or install another OpenBLAS", rt_cpu_blas_core());
out:
    rt_free(job.scratch);
    rt_free(job.good);
    return st;
}

static void gemm(CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
                 const float *b, int64_t ldb, float beta, float *c, int64_t ldc)
{
    if (m > 0 && n > 0)
        cblas_sgemm(CblasRowMajor, ta, tb, (blasint)m, (blasint)n, (blasint)k, alpha, a, (blasint)lda, b, (blasint)ldb, beta, c,
                    (blasint)ldc);
}

void rt_cpu_gemm_nt(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda, const float *b, int64_t ldb, float beta,
                    float *c, int64_t ldc)
{
    gemm(CblasNoTrans, CblasTrans, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void rt_cpu_gemm_nn(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda, const float *b, int64_t ldb, float beta,
                    float *c, int64_t ldc)
{
    gemm(CblasNoTrans, CblasNoTrans, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void rt_cpu_gemm_tn(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda, const float *b, int64_t ldb, float beta,
                    float *c, int64_t ldc)
{
    gemm(CblasTrans, CblasNoTrans, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
