/* A student with its tokenizer and template, opened from a directory or made new from a configuration. */
#ifndef RT_DISTILL_LOADED_STUDENT_H
#define RT_DISTILL_LOADED_STUDENT_H

#include "distill/model_dir.h"
#include "student/model.h"

struct rt_loaded_student {
    char path[4096];               /* of the weights; "" for a new one */
    struct rt_student_config c;
    struct rt_params p;
    struct rt_model_dir model;
    struct rt_arena weights;
    struct rt_student *s;          /* NULL before rt_loaded_student_create */
    const struct rt_device *d;
    struct rt_tensors *tensors;
};

struct rt_student_source {
    const char *student;       /* directory, run or checkpoint; NULL: a new one */
    const char *init_config;   /* config.json of a new one; NULL: student */
    const char *tokenizer;     /* directory; NULL: the student's, or that of init_config */
    const char *template_name; /* NULL: the directory's own */
};

/* Reads configuration, headers and tokenizer; nothing is allocated for the weights. Of a checkpoint (a MANIFEST is there) the student's files
 * are held against their hashes first, FORMAT names a damaged one, and the tokenizer is that of the run it lies in, where that can be found.
 * USAGE: neither or both of student, init_config. */
enum rt_status rt_loaded_student_open(struct rt_loaded_student *l, const struct rt_student_source *source, struct rt_log *log,
                                      struct rt_err *err);
/* Weights for sequences up to max_length tokens: loaded, or random by seed. d is borrowed. */
enum rt_status rt_loaded_student_create(struct rt_loaded_student *l, const struct rt_device *d, int64_t max_length, uint64_t seed,
                                        struct rt_err *err);
void rt_loaded_student_close(struct rt_loaded_student *l); /* zeroed is fine */
/* SHA-256 of the parameters as float32 under their published names, 64 hexadecimal digits. */
enum rt_status rt_loaded_student_hash(const struct rt_loaded_student *l, char out[65], struct rt_err *err);

#endif
