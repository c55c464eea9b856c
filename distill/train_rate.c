/* How fast a run is, of what the hardware could do. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "distill/train_run.h"
#include "student/describe.h"

/* Peak operations a second of products of dense BF16 matrices with float32 sums, from NVIDIA's data sheets (half of those with sparsity), by what
 * the device calls itself; the first match counts. */
static const struct {
    const char *name;
    double peak;
} peaks[] = {
    {"H200", 989e12}, {"H100 PCIe", 756e12}, {"H100 NVL", 835e12}, {"H100", 989e12}, {"A100", 312e12}, {"L40S", 362e12},
};

static double peak_of(const struct rt_device *d, const char **name)
{
    const char *says = d->be->describe(d->dev);
    *name = NULL;
    for (size_t i = 0; d->be->own_memory && d->be->act == RT_BF16 && i < sizeof peaks / sizeof peaks[0]; i++)
        if (strstr(says, peaks[i].name) != NULL) {
            *name = peaks[i].name;
            return peaks[i].peak;
        }
    return NAN;
}

void rt_train_log_rate(const struct rt_train_run *r)
{
    static const char formula[] = "(6 N + 6 L nh hd len) a token, N: parameters it is multiplied with, len: length of its document, attention causal";
    const char *name;
    const double peak = peak_of(&r->device, &name);
    if (name != NULL)
        rt_info(r->ctx->log, "MFU: operations %s, of %.0f TFLOP/s a GPU (%s, dense BF16)", formula, peak / 1e12, name);
    else
        rt_info(r->ctx->log, "MFU: unknown, no peak is known for this device; operations are %s", formula);
}

double rt_train_mfu(const struct rt_train_run *r, const struct rt_step_result *s, double seconds)
{
    const char *name;
    const double peak = peak_of(&r->device, &name);
    double squares = 0;
    for (int64_t i = 0; i < s->n; i++) {
        const double len = (double)rt_train_set_length(r->set[s->batch[i].set], s->batch[i].seq);
        squares += len * len;
    }
    const double flops = (double)s->tokens * rt_student_flops_per_token(&r->student.c, &r->student.p, squares / (double)s->tokens);
    return flops / seconds / (peak * r->rank.size);
}

int64_t rt_train_memory(const struct rt_train_run *r)
{
    struct rt_dev_memory m = {0};
    if (!r->device.be->own_memory)
        return rt_train_peak_memory();
    return r->device.be->memory(r->device.dev, &m, NULL) == RT_OK ? (int64_t)(m.total - m.free) : 0;
}

double rt_train_seconds_left(const struct rt_train_run *r)
{
    const double done = (double)r->trainer.tokens;
    return done > 0 ? r->seconds / done * ((double)r->total_tokens - done) : NAN;
}

void rt_train_log_step(const struct rt_train_run *r, const struct rt_step_result *s, double lr, double seconds)
{
    const struct rt_loss_sums *m = &s->sums;
    const struct rt_trainer *t = &r->trainer;
    const double mfu = rt_train_mfu(r, s, seconds), n = (double)m->kl_rows;
    char ce[32] = "", kl[160] = "", feature[48] = "", alm[48] = "", part[32] = "", clipped[48] = "", a[32], b[32];
    if (m->rows > 0)
        snprintf(ce, sizeof ce, " ce %.4f", m->ce / (double)m->rows);
    if (m->kl_rows > 0)
        snprintf(kl, sizeof kl, " kl %.4f mass %.3f/%.3f agreement %.3f", m->kl / n, m->teacher_mass / n, m->student_mass / n, (double)m->agree / n);
    if (m->spans.spans > 0)
        snprintf(alm, sizeof alm, " alm %.4f", m->spans.loss / (double)m->spans.spans);
    if (m->feature_rows > 0)
        snprintf(feature, sizeof feature, " feature %.4g", m->feature / (double)m->feature_rows);
    if (t->opt.step > 0)
        snprintf(clipped, sizeof clipped, " (%.0f %% of steps clipped)", 100 * rt_trainer_clipped(t));
    if (!isnan(mfu))
        snprintf(part, sizeof part, ", MFU %.1f %%", 100 * mfu);
    rt_info(r->ctx->log, "step %ld/%ld loss %.4f%s%s%s%s grad_norm %.3g%s lr %.3g %.0f tokens/s%s, memory %s, %s left", (long)t->step,
            (long)r->total_steps, s->loss, ce, kl, feature, alm, s->grad_norm, clipped, lr, (double)s->tokens / seconds, part,
            rt_human_bytes(a, (uint64_t)rt_train_memory(r)), rt_human_time(b, rt_train_seconds_left(r)));
}
