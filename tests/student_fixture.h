/* Small students with random weights, and a loss over them: shared by the suites of the student. */
#ifndef RT_TESTS_STUDENT_FIXTURE_H
#define RT_TESTS_STUDENT_FIXTURE_H

#include "student/optimizer.h"
#include "tests/suite.h"

enum { FX_QWEN2, FX_QWEN3, FX_LLAMA, FX_N, FX_TOKENS = 64, FX_TOP = 3 };
extern const char *const fx_config[FX_N]; /* bias and tied; q/k norm with head_dim != H/nh; untied, biases everywhere, llama3 rope */

struct fx {
    struct rt_device d;
    struct rt_student_config c;
    struct rt_params p;
    struct rt_arena weights, grads, acts, moments, loss;
    struct rt_student *s;
    bool first; /* the next backward of fx_loss is a step's first */
    /* device buffers of the loss, FX_TOKENS rows */
    void *dx, *dh;
    int32_t *label, *top;
    float *logp, *target;
    uint8_t *mask;
    double *ce, *kl, *feature;
};

/* NULL where this build or machine has none. */
const struct rt_backend *fx_backend(const char *name);
/* max_position tokens at most; all parameters random (biases and norms too), the same for every backend. */
void fx_open(struct fx *f, const struct rt_backend *be, int threads, const char *config);
void fx_close(struct fx *f);

/* Random documents: ids and ends. lens[n_seq], sum <= FX_TOKENS. */
struct fx_docs {
    int32_t ids[FX_TOKENS], cu[FX_TOKENS + 1];
    int64_t n, n_seq;
    int64_t first; /* place of the first token in the whole, which its targets depend on */
};
void fx_docs(struct fx_docs *docs, const struct fx *f, uint64_t seed, const int *lens, int n_seq);
/* Document i alone. */
struct fx_docs fx_one(const struct fx_docs *docs, int i);
struct rt_student_batch fx_batch(const struct fx_docs *docs);

/* Sum over the rows of w_ce CE + w_kl KL (bucket, T 2) + a feature loss (mse) at hidden states 0, 1 and the last, with targets that
 * depend on a row's place in the whole; gradients += when asked. */
double fx_loss(struct fx *f, const struct fx_docs *docs, bool backward);
/* The gradients of a backward that writes those of the layers over NaN are those of one that adds to zeros. */
void fx_first_backward(const struct rt_backend *be, const char *config, const int *lens, int n_seq);
/* Gradient of entry i as float; freed with free. */
float *fx_grad(const struct fx *f, int i);
/* Logits [n, V] of whole documents through the forward, as float; freed with free. */
float *fx_forward_logits(struct fx *f, const struct fx_docs *docs);
/* act elements of the last forward as float, [n]. */
void fx_fetch(const struct fx *f, const void *x, int64_t n, float *out);

#endif
