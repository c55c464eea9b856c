/* What the measuring programs share: pairs of timings, the same multiplications by plain OpenBLAS, and the report.
 *
 * A measurement is a number of pairs, ours and plain sgemm in turn (the order changes from pair to pair, since the speed of a shared
 * machine drifts), and the median of time(sgemm) / time(ours). The products are listed at their real shapes; each list entry is
 * cut for the threads in the way that calibration finds fastest, with float32 operands that already lie in memory. Weights come from a
 * block larger than usual caches, at an address that moves on with each product, as the weights of a model do.
 */
#ifndef RT_BENCH_BENCH_H
#define RT_BENCH_BENCH_H

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "bench/median.h"
#include "core/cpu/cpu.h"
#include "core/log.h"
#include "core/mem.h"
#include "core/options.h"
#include "core/rng.h"

#define BENCH_UNUSED __attribute__((unused))

enum { BENCH_MULS = 8192, BENCH_PAIRS = 99, BENCH_WAYS = 7 };

/* c[m,n] = a b, with the operands' layouts of the pass it belongs to; `batch` independent ones. */
enum bench_kind { BENCH_NT, BENCH_NN, BENCH_TN };
struct bench_mul {
    const char *name;
    enum bench_kind kind;
    int64_t m, n, k, batch;
    bool weights; /* b is a weight: read from the large block */
    int way;      /* how it is cut: index of the table in bench_item */
};

struct bench_list {
    struct bench_mul mul[BENCH_MULS];
    int n;
    struct rt_pool *pool;
    int threads;
    float *weight, *a, *c;
    int64_t weight_floats, a_floats, c_floats, at;
};

/* rows x columns of the cut in each way; way 0 hands out whole products */
static const int bench_cut[BENCH_WAYS][2] = {{1, 1}, {2, 1}, {1, 2}, {4, 1}, {1, 4}, {2, 2}, {4, 2}};

static inline void bench_fatal(const char *program, const struct rt_err *err)
{
    fprintf(stderr, "%s: %s\n", program, err->msg);
    exit(rt_exit_code(err->status));
}

static inline void bench_add(struct bench_list *l, const char *name, enum bench_kind kind, int64_t m, int64_t n, int64_t k, int64_t batch,
                             bool weights)
{
    if (l->n == BENCH_MULS || m <= 0 || batch <= 0) {
        if (l->n == BENCH_MULS)
            fprintf(stderr, "bench: more than %d products; %s is left out\n", BENCH_MULS, name);
        return;
    }
    l->mul[l->n++] = (struct bench_mul){name, kind, m, n, k, batch, weights, 0};
}

/* Causal attention of one sequence in blocks of queries, which is what a caller of sgemm can skip; heads times sequences of it. */
static inline void bench_add_causal(struct bench_list *l, const char *name, int64_t len, int64_t dqk, int64_t dv, int64_t batch, bool backward)
{
    enum { BLOCK = 128 };
    for (int64_t q = 0; q < len; q += BLOCK) {
        const int64_t m = rt_min64(BLOCK, len - q), keys = q + m;
        bench_add(l, name, BENCH_NT, m, keys, dqk, batch, false);    /* scores */
        bench_add(l, name, BENCH_NN, m, dv, keys, batch, false);     /* output */
        if (!backward)
            continue;
        bench_add(l, name, BENCH_NT, m, keys, dqk, batch, false);    /* scores again */
        bench_add(l, name, BENCH_NT, m, keys, dv, batch, false);     /* dP */
        bench_add(l, name, BENCH_TN, keys, dv, m, batch, false);     /* dV */
        bench_add(l, name, BENCH_TN, keys, dqk, m, batch, false);    /* dK */
        bench_add(l, name, BENCH_NN, m, dqk, keys, batch, false);    /* dQ */
    }
}

static inline double bench_flop(const struct bench_list *l)
{
    double sum = 0;
    for (int i = 0; i < l->n; i++)
        sum += 2.0 * (double)l->mul[i].m * (double)l->mul[i].n * (double)l->mul[i].k * (double)l->mul[i].batch;
    return sum;
}

struct bench_part {
    const struct bench_list *l;
    const struct bench_mul *mul;
    int rows, cols;
    int64_t at; /* of the first weight */
};

/* A matrix of `floats` elements at about `at` of a block, wrapped into it. */
static inline const float *bench_block(const float *block, int64_t size, int64_t at, int64_t floats)
{
    return block + at % (size - floats + 1) / 16 * 16;
}

static inline void bench_item(void *ctx, int64_t item, BENCH_UNUSED int worker)
{
    const struct bench_part *p = ctx;
    const struct bench_mul *u = p->mul;
    const int64_t one = p->rows * p->cols, which = item / one, r = item % one / p->cols, c = item % one % p->cols;
    const int64_t i0 = u->m * r / p->rows, i1 = u->m * (r + 1) / p->rows, j0 = u->n * c / p->cols, j1 = u->n * (c + 1) / p->cols;
    const float *a = bench_block(p->l->a, p->l->a_floats, which * u->m * u->k, u->m * u->k);
    const float *b = u->weights ? bench_block(p->l->weight, p->l->weight_floats, p->at + which * u->n * u->k, u->n * u->k)
                                : bench_block(p->l->a, p->l->a_floats, which * u->n * u->k, u->n * u->k);
    float *out = (float *)(uintptr_t)bench_block(p->l->c, p->l->c_floats, which * u->m * u->n, u->m * u->n) + i0 * u->n + j0;
    if (u->kind == BENCH_NT)
        rt_cpu_gemm_nt(i1 - i0, j1 - j0, u->k, 1, a + i0 * u->k, u->k, b + j0 * u->k, u->k, 0, out, u->n);
    else if (u->kind == BENCH_NN)
        rt_cpu_gemm_nn(i1 - i0, j1 - j0, u->k, 1, a + i0 * u->k, u->k, b + j0, u->n, 0, out, u->n);
    else
        rt_cpu_gemm_tn(i1 - i0, j1 - j0, u->k, 1, a + i0, u->m, b + j0, u->n, 0, out, u->n);
}

static inline void bench_multiply(struct bench_list *l, const struct bench_mul *u, int way)
{
    const struct bench_part p = {l, u, bench_cut[way][0], bench_cut[way][1], l->at};
    if (u->weights) /* the next weights, not the last ones again */
        l->at = (l->at + u->n * u->k * u->batch) % l->weight_floats;
    rt_pool_run(l->pool, u->batch * p.rows * p.cols, bench_item, (void *)(uintptr_t)&p);
}

static inline void bench_run_list(struct bench_list *l)
{
    for (int i = 0; i < l->n; i++)
        bench_multiply(l, &l->mul[i], l->mul[i].way);
}

/* The first product of the list with the shape of product i. */
static inline int bench_twin(const struct bench_list *l, int i)
{
    const struct bench_mul *u = &l->mul[i], *t = l->mul;
    while (t->kind != u->kind || t->m != u->m || t->n != u->n || t->k != u->k || t->batch != u->batch || t->weights != u->weights)
        t++;
    return (int)(t - l->mul);
}

/* Operands, and the fastest way of cutting each product. weight_bytes: of the block that weights are read from. */
static inline enum rt_status bench_calibrate(struct bench_list *l, int threads, size_t weight_bytes, struct rt_err *err)
{
    enum rt_status st;
    int64_t most = 0;
    for (int i = 0; i < l->n; i++) {
        const struct bench_mul *u = &l->mul[i];
        const int64_t batch = rt_min64(u->batch, 64);
        most = rt_max64(most, u->n * u->k);
        l->a_floats = rt_max64(l->a_floats, batch * rt_max64(u->m * u->k, u->weights ? 0 : u->n * u->k));
        l->c_floats = rt_max64(l->c_floats, batch * u->m * u->n);
    }
    l->weight_floats = rt_max64((int64_t)(weight_bytes / sizeof(float)), most + 16);
    l->threads = threads;
    RT_TRY(rt_pool_create(threads, &l->pool, err));
    RT_TRY(rt_alloc((size_t)l->weight_floats + 16, sizeof(float), "weights of the plain products", &l->weight, err));
    RT_TRY(rt_alloc((size_t)l->a_floats + 16, sizeof(float), "operands of the plain products", &l->a, err));
    RT_TRY(rt_alloc((size_t)l->c_floats + 16, sizeof(float), "results of the plain products", &l->c, err));
    for (int64_t i = 0; i < l->weight_floats; i++)
        l->weight[i] = (float)((i * 2654435761u >> 7) % 2048) * 0x1p-11f - 0.5f;
    for (int64_t i = 0; i < l->a_floats; i++)
        l->a[i] = (float)((i * 2246822519u >> 7) % 2048) * 0x1p-11f - 0.5f;
    for (int i = 0; i < l->n; i++) {
        struct bench_mul *u = &l->mul[i];
        const int twin = bench_twin(l, i);
        double best = 1e30;
        if (twin < i) {
            u->way = l->mul[twin].way;
            continue;
        }
        for (int way = u->batch >= threads ? 0 : 1; way < (u->batch >= 2 * threads ? 1 : BENCH_WAYS); way++)
            for (int repeat = 0; repeat < 3; repeat++) {
                const double t0 = rt_now();
                bench_multiply(l, u, way);
                const double t = rt_now() - t0;
                if (t < best) {
                    best = t;
                    u->way = way;
                }
            }
    }
out:
    return st;
}

static inline void bench_list_free(struct bench_list *l)
{
    rt_pool_free(l->pool);
    rt_free(l->weight);
    rt_free(l->a);
    rt_free(l->c);
}

/* ---- pairs ---- */
static inline double bench_cpu_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

struct bench_time {
    double wall, cpu; /* seconds; cpu over all threads */
};
struct bench_result {
    int pairs;
    struct bench_time ours[BENCH_PAIRS], plain[BENCH_PAIRS];
    double ratio[BENCH_PAIRS], median, low, high, cpu_median; /* plain / ours */
    double ours_median, plain_median;                         /* seconds */
};

static inline double bench_median(const double *v, int n)
{
    double t[BENCH_PAIRS];
    memcpy(t, v, (size_t)n * sizeof *t);
    qsort(t, (size_t)n, sizeof *t, bench_by_value);
    return n % 2 ? t[n / 2] : (t[n / 2 - 1] + t[n / 2]) / 2;
}

/* ours(ctx) fails with an error in err. One round of each warms up. */
static inline enum rt_status bench_pairs(struct bench_list *l, int pairs, enum rt_status (*ours)(void *, struct rt_err *), void *ctx,
                                         struct bench_result *r, struct rt_err *err)
{
    double v[BENCH_PAIRS], w[BENCH_PAIRS], c[BENCH_PAIRS];
    enum rt_status st = RT_OK;
    r->pairs = pairs;
    for (int i = -1; i < pairs; i++)
        for (int half = 0; half < 2; half++) {
            const bool own = (half == 0) == (i % 2 == 0);
            const double t0 = rt_now(), c0 = bench_cpu_now();
            if (own)
                RT_TRY(ours(ctx, err));
            else
                bench_run_list(l);
            const struct bench_time t = {rt_now() - t0, bench_cpu_now() - c0};
            if (i >= 0)
                *(own ? &r->ours[i] : &r->plain[i]) = t;
        }
    for (int i = 0; i < pairs; i++) {
        r->ratio[i] = r->plain[i].wall / r->ours[i].wall;
        c[i] = r->plain[i].cpu / r->ours[i].cpu;
        v[i] = r->ours[i].wall;
        w[i] = r->plain[i].wall;
    }
    r->median = bench_median(r->ratio, pairs);
    r->cpu_median = bench_median(c, pairs);
    r->ours_median = bench_median(v, pairs);
    r->plain_median = bench_median(w, pairs);
    r->low = r->high = r->ratio[0];
    for (int i = 1; i < pairs; i++) {
        r->low = r->ratio[i] < r->low ? r->ratio[i] : r->low;
        r->high = r->ratio[i] > r->high ? r->ratio[i] : r->high;
    }
out:
    return st;
}

/* ---- report ---- */
static inline void bench_line_of(const char *command, char *out, size_t cap)
{
    FILE *f = popen(command, "r");
    out[0] = '\0';
    if (f == NULL)
        return;
    if (fgets(out, (int)cap, f) == NULL)
        out[0] = '\0';
    out[strcspn(out, "\n")] = '\0';
    pclose(f);
}

static inline void bench_machine(char *out, size_t cap)
{
    char line[256], model[128] = "unknown processor";
    double load[3] = {0};
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f != NULL && fgets(line, sizeof line, f) != NULL)
        if (strncmp(line, "model name", 10) == 0 && strchr(line, ':') != NULL) {
            snprintf(model, sizeof model, "%.120s", strchr(line, ':') + 2);
            model[strcspn(model, "\n")] = '\0';
            break;
        }
    if (f != NULL)
        fclose(f);
    (void)getloadavg(load, 3);
    snprintf(out, cap, "%s, %d cores, OpenBLAS %s, load %.1f", model, rt_cpu_count(), rt_cpu_blas_core(), load[0]);
}

/* what: the case; tokens: of one run of ours. */
static inline void bench_report(bool json, int argc, char *const *argv, const char *what, const struct bench_list *l, const struct bench_result *r,
                                double tokens)
{
    char commit[64], machine[256];
    const double flop = bench_flop(l);
    bench_line_of("git describe --always --dirty 2>/dev/null", commit, sizeof commit);
    bench_machine(machine, sizeof machine);
    if (json) {
        printf("{\"case\":\"%s\",\"commit\":\"%s\",\"machine\":\"%s\",\"threads\":%d,\"command\":\"", what, commit, machine, l->threads);
        for (int i = 0; i < argc; i++)
            for (const char *p = i > 0 && putchar(' ') ? argv[i] : argv[i]; *p != '\0'; p++)
                if (*p != '"' && *p != '\\' && (unsigned char)*p >= ' ')
                    putchar(*p);
        printf("\",\"tokens\":%.0f,\"tokens_per_s\":%.6g,\"gflop\":%.6g,\"gflops\":%.6g,\"sgemm_gflops\":%.6g,\"share\":%.4f,\"share_low\":%.4f,"
               "\"share_high\":%.4f,\"share_of_cpu_time\":%.4f,\"pairs\":[", tokens, tokens / r->ours_median, flop * 1e-9,
               flop * 1e-9 / r->ours_median, flop * 1e-9 / r->plain_median, r->median, r->low, r->high, r->cpu_median);
        for (int i = 0; i < r->pairs; i++)
            printf("%s{\"ours_s\":%.5f,\"sgemm_s\":%.5f}", i > 0 ? "," : "", r->ours[i].wall, r->plain[i].wall);
        printf("]}\n");
        return;
    }
    printf("%s\n  commit %s; %s; %d threads\n  command:", what, commit, machine, l->threads);
    for (int i = 0; i < argc; i++)
        printf(" %s", argv[i]);
    printf("\n  %.0f tokens, %.4g GFLOP of products\n  pair    ours s   sgemm s   share   share of cpu time\n", tokens, flop * 1e-9);
    for (int i = 0; i < r->pairs; i++)
        printf("  %4d  %8.3f  %8.3f   %4.0f%%   %4.0f%%\n", i + 1, r->ours[i].wall, r->plain[i].wall, 100 * r->ratio[i],
               100 * r->plain[i].cpu / r->ours[i].cpu);
    printf("  median: %.0f%% of sgemm (%.0f to %.0f; cpu time %.0f%%), %.4g tokens/s, %.1f GFLOP/s, sgemm %.1f GFLOP/s\n", 100 * r->median,
           100 * r->low, 100 * r->high, 100 * r->cpu_median, tokens / r->ours_median, flop * 1e-9 / r->ours_median, flop * 1e-9 / r->plain_median);
    fflush(stdout);
}

/* Speed of each product by itself, best of 5: where plain sgemm spends its time. */
static inline void bench_print_list(struct bench_list *l)
{
    for (int i = 0; i < l->n; i++) {
        const struct bench_mul *u = &l->mul[i];
        const double flop = 2.0 * (double)u->m * (double)u->n * (double)u->k * (double)u->batch;
        double best = 1e30;
        int times = 0;
        for (int j = i; j < l->n; j++)
            times += bench_twin(l, j) == i;
        for (int repeat = 0; repeat < 5 && times > 0; repeat++) {
            const double t0 = rt_now();
            bench_multiply(l, u, u->way);
            best = rt_now() - t0 < best ? rt_now() - t0 : best;
        }
        if (times > 0)
            printf("  %-12s %6lld x %6lld x %6lld x %4lld  cut %dx%d  %8.2f ms  %7.1f GFLOP/s  %d times\n", u->name, (long long)u->m,
                   (long long)u->n, (long long)u->k, (long long)u->batch, bench_cut[u->way][0], bench_cut[u->way][1], best * 1e3,
                   flop / best * 1e-9, times);
    }
}

#endif
