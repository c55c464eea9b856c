/* The tree behind struct rt_json: nodes and strings live in their document's chunks, freed together. */
#ifndef RT_FORMATS_JSON_NODE_H
#define RT_FORMATS_JSON_NODE_H

#include "formats/json.h"

struct rt_json_chunk {
    struct rt_json_chunk *next;
    size_t used, size;
    _Alignas(16) char data[];
};

struct rt_json_doc {
    struct rt_json_chunk *chunks;
    size_t next_size;
    uint64_t seed[2]; /* of the key hash; drawn when the first index is made */
    bool seeded;
    char *source;
    struct rt_json *root;
};

struct rt_json {
    struct rt_json_doc *doc;
    enum rt_json_type type;
    union {
        bool b;
        int64_t i;
        struct {
            double d;
            const char *text; /* as its source writes it, terminated; NULL for one that was set */
        } real;
        struct {
            char *s; /* terminated */
            size_t n;
        } str;
        struct {
            struct rt_json **at; /* [n] items in order */
            const char **key;    /* [n] objects only */
            uint32_t *slot;      /* [mask + 1] item + 1 by key hash, 0: free; NULL while small */
            uint32_t n, cap, mask;
        } box;
    } u;
};

enum { RT_JSON_DEPTH = 64, RT_JSON_INDEX_FROM = 9 };

enum rt_status rt_json_doc_new(const char *source, struct rt_json_doc **out, struct rt_err *err);
void rt_json_doc_free(struct rt_json_doc *doc);
enum rt_status rt_json_doc_alloc(struct rt_json_doc *doc, size_t bytes, void *out_ptr_to_ptr, struct rt_err *err);
enum rt_status rt_json_doc_string(struct rt_json_doc *doc, const char *s, size_t n, char **out, struct rt_err *err);
enum rt_status rt_json_node_new(struct rt_json_doc *doc, enum rt_json_type type, struct rt_json **out, struct rt_err *err);
/* Room for cap items in all; the index is made or grown where an object has RT_JSON_INDEX_FROM or more. */
enum rt_status rt_json_box_reserve(struct rt_json *box, size_t cap, struct rt_err *err);
/* Appends item under key (owned by the doc; NULL in arrays). Room was reserved; the key is new. */
void rt_json_box_push(struct rt_json *box, const char *key, struct rt_json *item);
/* Position of key, -1 where absent. */
int64_t rt_json_box_find(const struct rt_json *box, const char *key);

#endif
