#include "formats/json_node.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

enum { CHUNK_FIRST = 2048, CHUNK_LAST = 1 << 20 };

enum rt_status rt_json_doc_new(const char *source, struct rt_json_doc **out, struct rt_err *err)
{
    struct rt_json_doc *doc = calloc(1, sizeof *doc);
    if (doc != NULL)
        doc->source = strdup(source);
    if (doc == NULL || doc->source == NULL) {
        free(doc);
        return rt_fail(err, RT_NOMEM, "out of memory for the JSON of %s", source);
    }
    doc->next_size = CHUNK_FIRST;
    *out = doc;
    return RT_OK;
}

void rt_json_doc_free(struct rt_json_doc *doc)
{
    if (doc == NULL)
        return;
    for (struct rt_json_chunk *c = doc->chunks, *next; c != NULL; c = next) {
        next = c->next;
        free(c);
    }
    free(doc->source);
    free(doc);
}

enum rt_status rt_json_doc_alloc(struct rt_json_doc *doc, size_t bytes, void *out_ptr_to_ptr, struct rt_err *err)
{
    struct rt_json_chunk *c = doc->chunks;
    const size_t need = (bytes + 15) & ~(size_t)15;
    if (c == NULL || c->size - c->used < need) {
        const size_t size = need > doc->next_size / 2 ? need : doc->next_size;
        c = need < bytes || size > SIZE_MAX - sizeof *c ? NULL : malloc(sizeof *c + size);
        if (c == NULL)
            return rt_fail(err, RT_NOMEM, "out of memory for the JSON of %s (%zu bytes)", doc->source, bytes);
        c->size = size;
        c->used = 0;
        if (size == need && doc->chunks != NULL) { /* a big one: the current chunk goes on being filled */
            c->next = doc->chunks->next;
            doc->chunks->next = c;
        } else {
            c->next = doc->chunks;
            doc->chunks = c;
            if (doc->next_size < CHUNK_LAST)
                doc->next_size *= 2;
        }
    }
    void *p = c->data + c->used;
    c->used += need;
    memcpy(out_ptr_to_ptr, &p, sizeof p);
    return RT_OK;
}

enum rt_status rt_json_doc_string(struct rt_json_doc *doc, const char *s, size_t n, char **out, struct rt_err *err)
{
    char *copy;
    const enum rt_status st = rt_json_doc_alloc(doc, n + 1, &copy, err);
    if (st != RT_OK)
        return st;
    if (n > 0)
        memcpy(copy, s, n);
    copy[n] = '\0';
    *out = copy;
    return RT_OK;
}

enum rt_status rt_json_node_new(struct rt_json_doc *doc, enum rt_json_type type, struct rt_json **out, struct rt_err *err)
{
    const enum rt_status st = rt_json_doc_alloc(doc, sizeof **out, out, err);
    if (st != RT_OK)
        return st;
    memset(*out, 0, sizeof **out);
    (*out)->doc = doc;
    (*out)->type = type;
    return RT_OK;
}

/* SipHash-1-3: a file's author cannot choose keys that collide. */
static uint64_t rotl(uint64_t x, int b)
{
    return x << b | x >> (64 - b);
}

static void sip_round(uint64_t v[4])
{
    v[0] += v[1], v[2] += v[3];
    v[1] = rotl(v[1], 13) ^ v[0], v[3] = rotl(v[3], 16) ^ v[2];
    v[0] = rotl(v[0], 32);
    v[2] += v[1], v[0] += v[3];
    v[1] = rotl(v[1], 17) ^ v[2], v[3] = rotl(v[3], 21) ^ v[0];
    v[2] = rotl(v[2], 32);
}

static uint32_t key_hash(const struct rt_json_doc *doc, const char *key)
{
    const size_t n = strlen(key);
    uint64_t v[4] = {doc->seed[0] ^ 0x736f6d6570736575, doc->seed[1] ^ 0x646f72616e646f6d, doc->seed[0] ^ 0x6c7967656e657261,
                     doc->seed[1] ^ 0x7465646279746573};
    uint64_t m;
    size_t at = 0;
    for (; at + 8 <= n; at += 8) {
        memcpy(&m, key + at, 8);
        v[3] ^= m;
        sip_round(v);
        v[0] ^= m;
    }
    m = (uint64_t)n << 56;
    for (size_t i = at; i < n; i++)
        m |= (uint64_t)(unsigned char)key[i] << (8 * (i - at));
    v[3] ^= m;
    sip_round(v);
    v[0] ^= m;
    v[2] ^= 0xff;
    for (int i = 0; i < 3; i++)
        sip_round(v);
    return (uint32_t)(v[0] ^ v[1] ^ v[2] ^ v[3]);
}

static void slot_put(struct rt_json *box, uint32_t item)
{
    uint32_t s = key_hash(box->doc, box->u.box.key[item]) & box->u.box.mask;
    while (box->u.box.slot[s] != 0)
        s = (s + 1) & box->u.box.mask;
    box->u.box.slot[s] = item + 1;
}

enum rt_status rt_json_box_reserve(struct rt_json *box, size_t cap, struct rt_err *err)
{
    struct rt_json_doc *doc = box->doc;
    const bool object = box->type == RT_JSON_OBJECT;
    const uint32_t n = box->u.box.n;
    if (cap <= box->u.box.cap)
        return RT_OK;
    if (cap > (UINT32_MAX >> 2))
        return rt_fail(err, RT_NOMEM, "%s: too many JSON values", doc->source);
    struct rt_json **at = NULL;
    const char **key = NULL;
    uint32_t *slot = NULL, slots = 16;
    enum rt_status st = rt_json_doc_alloc(doc, cap * sizeof *at, &at, err);
    if (st == RT_OK && object)
        st = rt_json_doc_alloc(doc, cap * sizeof *key, &key, err);
    while (slots < cap * 2)
        slots *= 2;
    if (st == RT_OK && object && cap >= RT_JSON_INDEX_FROM)
        st = rt_json_doc_alloc(doc, slots * sizeof *slot, &slot, err);
    if (st != RT_OK)
        return st;
    if (n > 0) {
        memcpy(at, box->u.box.at, n * sizeof *at);
        if (object)
            memcpy(key, box->u.box.key, n * sizeof *key);
    }
    box->u.box.at = at;
    box->u.box.key = key;
    box->u.box.cap = (uint32_t)cap;
    if (slot != NULL) {
        if (!doc->seeded && getrandom(doc->seed, sizeof doc->seed, GRND_NONBLOCK) != (ssize_t)sizeof doc->seed)
            doc->seed[0] = (uint64_t)(uintptr_t)doc; /* early boot: the address is what is left */
        doc->seeded = true;
        memset(slot, 0, slots * sizeof *slot);
        box->u.box.slot = slot;
        box->u.box.mask = slots - 1;
        for (uint32_t i = 0; i < n; i++)
            slot_put(box, i);
    }
    return RT_OK;
}

void rt_json_box_push(struct rt_json *box, const char *key, struct rt_json *item)
{
    const uint32_t i = box->u.box.n++;
    RT_ASSERT(i < box->u.box.cap);
    box->u.box.at[i] = item;
    if (box->type != RT_JSON_OBJECT)
        return;
    box->u.box.key[i] = key;
    if (box->u.box.slot != NULL)
        slot_put(box, i);
}

int64_t rt_json_box_find(const struct rt_json *box, const char *key)
{
    if (box->u.box.slot == NULL) {
        for (uint32_t i = 0; i < box->u.box.n; i++)
            if (strcmp(box->u.box.key[i], key) == 0)
                return i;
        return -1;
    }
    uint32_t s = key_hash(box->doc, key) & box->u.box.mask;
    for (; box->u.box.slot[s] != 0; s = (s + 1) & box->u.box.mask)
        if (strcmp(box->u.box.key[box->u.box.slot[s] - 1], key) == 0)
            return box->u.box.slot[s] - 1;
    return -1;
}
