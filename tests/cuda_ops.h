/* Helpers of the cuda backend's tests: each operation on the GPU against `ref` from the same rounded inputs.
 *
 * A test begins with `struct cuda_pair p; if (!cuda_pair_open(&p)) TEST_SKIP("no GPU");` and ends with cuda_pair_close. Inputs are float arrays
 * rounded to what the GPU holds (cuda_round); outputs carry a guard behind their last element that must survive.
 */
#ifndef RT_TESTS_CUDA_OPS_H
#define RT_TESTS_CUDA_OPS_H

#include <stdbool.h>
#include <stdint.h>

#include "core/backend.h"
#include "tests/suite.h"

struct cuda_pair {
    struct rt_device ref; /* float32 on the host: test arrays serve as its memory */
    struct rt_device gpu;
};
/* false: this build has no cuda backend, or the machine no GPU. */
bool cuda_pair_open(struct cuda_pair *p);
void cuda_pair_close(struct cuda_pair *p);

/* x [n] = normal numbers times scale, rounded to bfloat16. */
void cuda_random(float *x, int64_t n, uint64_t stream, float scale);
/* x [n] rounded to bfloat16 in place. */
void cuda_round(float *x, int64_t n);
/* [n] zeros, by rt_free; n may be 0. */
float *cuda_floats(int64_t n);
/* The same, with the numbers of cuda_random. */
float *cuda_numbers(int64_t n, uint64_t stream, float scale);
/* y [rows, cols] at distance ld: NaN, which what overwrites must not read. */
void cuda_poison(float *y, int64_t rows, int64_t cols, int64_t ld);

/* Device arrays. act: BF16 from floats. Each has a guard of 256 bytes behind it; freed by cuda_free, which checks the guard. */
void *cuda_act(struct cuda_pair *p, const float *x, int64_t n);          /* x NULL: poisoned with NaN */
void *cuda_bytes(struct cuda_pair *p, const void *x, size_t bytes);      /* as they are; x NULL: poisoned with 0xff */
void cuda_free(struct cuda_pair *p, void *dev);
/* On the queue of p->gpu, which does not wait for the default stream: bytes = value; rows of `row` bytes, each at its distance. */
void cuda_set(struct cuda_pair *p, void *dst, int value, size_t bytes);
void cuda_copy_rows(struct cuda_pair *p, void *dst, size_t dst_ld, const void *src, size_t src_ld, size_t row, size_t rows);
/* Back to the host: act as floats; bytes. */
void cuda_get_act(struct cuda_pair *p, float *x, const void *dev, int64_t n);
void cuda_get(struct cuda_pair *p, void *x, const void *dev, size_t bytes);

/* The same weight on both sides: BF16 from floats rounded here; E4M3 random codes (no NaN) with random positive scales; F32 as it is. */
struct cuda_weight {
    struct rt_weight *ref, *gpu;
    void *data;
    float *scale;
};
struct cuda_weight cuda_weight_bf16(struct cuda_pair *p, int64_t rows, int64_t cols, uint64_t stream, float scale);
struct cuda_weight cuda_weight_e4m3(struct cuda_pair *p, int64_t rows, int64_t cols, uint64_t stream, float scale);
struct cuda_weight cuda_weight_f32(struct cuda_pair *p, int64_t rows, int64_t cols, uint64_t stream, float scale);
void cuda_weight_free(struct cuda_pair *p, struct cuda_weight *w);

/* A quantised operand on both sides, made by ref's quant from x [n, cols] (so both sides hold equal codes and scales). Free ref members with
 * rt_free, gpu members with cuda_free. */
struct cuda_quantised {
    struct rt_act ref, gpu;
};
struct cuda_quantised cuda_quantise(struct cuda_pair *p, const float *x, int64_t n, int64_t cols);
void cuda_quantised_free(struct cuda_pair *p, struct cuda_quantised *q);

/* |got - want|2 / |want|2 <= bound, also of the worst row of `cols` where row_bound > 0 (rows of norm 0 must be 0). Prints the figure. */
void cuda_close(const char *what, const float *got, const float *want, int64_t rows, int64_t cols, double bound, double row_bound);

/* Rounding once to bfloat16: 2^-8 at most for each element, 1.66e-3 in the mean square over many of them; with the sums' own order. A row that is
 * made up of a few numbers may come near 2^-8. */
#define CUDA_BF16_ONCE 2.5e-3
/* The same for n elements, which may be few. */
static inline double cuda_once(int64_t n) { return n < 2000 ? 0x1p-8 : CUDA_BF16_ONCE; }

#endif
