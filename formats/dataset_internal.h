/* Inside the reader of input lines: its state, and one line at a time. */
#ifndef RT_FORMATS_DATASET_INTERNAL_H
#define RT_FORMATS_DATASET_INTERNAL_H

#include "formats/dataset.h"

struct rt_dataset {
    struct rt_dataset_options opt;
    struct rt_dataset_counts counts;
    char path[4096];
    int fd;
    uint64_t size, read;  /* bytes of the file, and of them in or before the window */
    struct rt_buf window; /* what was read and not yet handed out begins at `at` */
    size_t at;
    int64_t line;

    char where[4096 + 32]; /* "FILE:LINE" */
    struct rt_json *json;
    struct rt_message *message;
    size_t message_cap;
    struct rt_rendered rendered;
    struct rt_buf answer;

    struct rt_sample whole; /* the line's sample; parts of it are left from `next` on */
    int next;
};

/* d->json -> d->whole, with ids and mask in d->rendered. */
enum rt_status rt_dataset_sample(struct rt_dataset *d, struct rt_err *err);
/* d->json -> *out. */
enum rt_status rt_dataset_prompt(struct rt_dataset *d, struct rt_prompt *out, struct rt_err *err);

#endif
