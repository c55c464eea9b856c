/* The decoder's own: what its files share (decode.h; decode.c: memory and callbacks; decode_step.c: what runs on the device). */
#ifndef RT_STUDENT_DECODE_INTERNAL_H
#define RT_STUDENT_DECODE_INTERNAL_H

#include "core/pages.h"
#include "student/decode.h"
#include "student/internal.h"

/* What a step is told, in one block that crosses at once. n: places for entries, rows: for rows. */
struct rt_decode_input {
    int32_t *ids, *slot, *pos; /* [n] */
    int32_t *rows;             /* [rows] entries whose logits are wanted */
    uint64_t *stream;          /* [rows] */
    int64_t *position;         /* [rows] */
};

/* Device pointers of a decoder, cut from one block. */
struct rt_decode_memory {
    struct rt_decode_input in;
    int32_t *table;      /* [slots][cols] pages */
    int32_t *drawn;      /* [rows] ids of the last step's rows */
    float *logprob;      /* [rows] */
    void *x, *normed, *qkv, *q, *o, *branch, *gate_up, *h;
    void *picked;        /* [rows, H] final states that get logits */
    float *logits;       /* [rows, V] */
    void **k, **v;       /* [layers] caches [pages][len][nkv*hd] */
};

enum { RT_DECODE_GRAPHS = 64, RT_DECODE_FLIGHTS = 2 };

/* A step of one size: run as it is the first time (products may be tuned then), recorded the second. */
struct rt_decode_graph {
    int n;
    bool met;
    struct rt_graph *graph;
};

/* Host memory of a step under way. */
struct rt_decode_flight {
    struct rt_decode_input in;
    int32_t *table;
    int32_t *drawn;
    float *logprob;
    int n_rows;
    struct rt_event *done;
};

struct rt_student_decoder {
    struct rt_student *s;
    struct rt_decoder_options o;
    int n, rows;            /* places of entries and of rows */
    int64_t capacity;       /* positions that a slot's row of the table stands for: whole pages */
    struct rt_pages pages;
    struct rt_arena arena;  /* base NULL: suspended */
    struct rt_decode_memory m;
    void *staging;          /* host, of the flights */
    struct rt_decode_flight flight[RT_DECODE_FLIGHTS];
    int64_t submitted, collected;
    struct rt_batch_law law; /* what the graphs were recorded with */
    struct rt_decode_graph graph[RT_DECODE_GRAPHS];
    float *logits;          /* [rows, V] host, made when first wanted */
};

/* Bytes of an input block, and its pointers into `block`. */
size_t rt_decode_input_bytes(int n, int rows);
void rt_decode_input_cut(void *block, int n, int rows, struct rt_decode_input *out);
/* Up to which number of entries a step of one token a slot is filled. */
int rt_decode_round(int n);

/* Enqueues a step of n entries and n_rows rows whose input and table are on the device. law NULL: up to the logits. */
enum rt_status rt_decode_enqueue(struct rt_student_decoder *d, int n, int n_rows, const struct rt_batch_law *law, struct rt_err *err);
/* The same by recorded work: n entries, each with a row. */
enum rt_status rt_decode_enqueue_recorded(struct rt_student_decoder *d, int n, const struct rt_batch_law *law, struct rt_err *err);
void rt_decode_forget_graphs(struct rt_student_decoder *d);

#endif
