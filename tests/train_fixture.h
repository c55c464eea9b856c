/* Small students, sequences and teachers' rows for the suites of training. */
#ifndef RT_TESTS_TRAIN_FIXTURE_H
#define RT_TESTS_TRAIN_FIXTURE_H

#include "distill/train_run.h"
#include "student/save.h"
#include "tests/suite.h"

enum { TF_SEQS = 12, TF_LEN = 24, TF_K = 8, TF_TIED = 0, TF_UNTIED = 1, TF_WIDE = 2, TF_DIM = 6 }; /* WIDE: heads that a GPU takes */

/* TF_SEQS sequences of 8 .. 23 random tokens; the first third of each is the prompt. */
struct tf_data {
    uint32_t ids[TF_SEQS][TF_LEN];
    uint8_t mask[TF_SEQS][TF_LEN];
    int64_t len[TF_SEQS];
    struct rt_row_identity id;
    /* rows of every prediction, whatever the mask */
    uint32_t position[TF_SEQS][TF_LEN], top_ids[TF_SEQS][TF_LEN * TF_K], next[TF_SEQS][TF_LEN], rank[TF_SEQS][TF_LEN];
    float logits[TF_SEQS][TF_LEN * TF_K], lse[TF_SEQS][TF_LEN * 2], logprob[TF_SEQS][TF_LEN];
    uint16_t state[TF_SEQS][TF_LEN * TF_DIM]; /* BF16, of teacher layer 1 and of the final norm alike */
};
void tf_data(struct tf_data *t, int64_t vocab, uint64_t seed);

struct tf {
    struct rt_device d;
    struct rt_student_config c;
    struct rt_params p;
    struct rt_arena weights;
    struct rt_student *s;
    struct rt_model_dir model; /* of no tokenizer */
};
/* A student with random parameters of deviation `scale`. */
void tf_open(struct tf *f, const struct rt_backend *be, int threads, int config, float scale);
void tf_open_on(struct tf *f, const struct rt_backend *be, const struct rt_dev_options *o, int config, float scale);
void tf_close(struct tf *f);
const char *tf_config(int config);

/* Fills the rows of t with what the student says: top TF_K, lse at T 1 and 2. */
void tf_score(struct tf_data *t, struct tf *f);
/* The sequences as a source in memory; with_rows false: none are stored. */
struct rt_row_source tf_source(struct tf_data *t);
struct rt_train_set *tf_set(struct tf_data *t, struct tf *f, bool features);

/* On disk: a student's directory, a shard set, JSON lines of input_ids and loss_mask. Paths of test_tmp. */
const char *tf_write_student(const char *name, int config, uint64_t seed);
const char *tf_write_shards(const char *name, struct tf_data *t);
const char *tf_write_lines(const char *name, const struct tf_data *t);

/* One student, its own rows as shards, and the same sequences as lines: files named after the suite. */
struct tf_files {
    char *student, *shards, *lines;
    struct tf_data *data;
};
void tf_files_make(struct tf_files *f, const char *suite); /* does nothing where they are there */
void tf_files_free(struct tf_files *f);
/* A suite's `files`: set_up, of every test that takes them, makes them, tear_down, of the last one, frees them. */
#define TF_FILES(suite) \
    static struct tf_files files; \
    static int set_up(void **state) \
    { \
        (void)state; \
        tf_files_make(&files, suite); \
        return 0; \
    } \
    static int tear_down(void **state) \
    { \
        (void)state; \
        tf_files_free(&files); \
        return 0; \
    }
/* A whole file of a directory. */
struct rt_buf tf_read(const char *dir, const char *name);

/* The student's parameters, by their offsets: f->p.elements floats, by free. */
float *tf_params(struct tf *f);

/* Options of an engine: CE and KL at T = 2, bucket. */
struct rt_trainer_options tf_options(void);
/* Whole blocks of parameters are the same bytes. */
bool tf_same_block(const struct tf *a, const struct tf *b);
/* The gradients as float, freed with free. */
float *tf_grads(const struct tf *f);

#endif
