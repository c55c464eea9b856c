#include "formats/bpe.h"

#include <string.h>

/* Words of at most CACHE_BYTES bytes and CACHE_IDS ids are kept; a newer one takes the place of an older one. */
enum { CACHE_SLOTS = 1 << 15, CACHE_BYTES = 29, CACHE_IDS = 10 };
enum { NONE = UINT32_MAX };

struct cached {
    uint64_t hash;
    uint32_t ids[CACHE_IDS];
    uint8_t n; /* 0: free */
    uint8_t len;
    char word[CACHE_BYTES];
};

struct merge {
    uint32_t left, right, rank, made;
};

/* Symbols of a word: a list linked by positions, as merges leave holes. */
struct symbol {
    uint32_t id, prev, next; /* id NONE: merged into the one before */
};

struct candidate {
    uint32_t rank, pos, made;
};

struct rt_bpe {
    const struct rt_vocab *vocab;
    struct merge *merge; /* left NONE: free */
    size_t mask;
    bool ignore_merges;
    uint32_t byte_id[256];
    struct cached *cache;
    struct rt_buf symbols, heap;
    size_t n_heap;
};

static uint64_t hash_bytes(const char *s, size_t len)
{
    const uint64_t k = 0x9e3779b97f4a7c15u;
    uint64_t h = len * k;
    while (len >= 8) {
        uint64_t w;
        memcpy(&w, s, 8);
        h = (h ^ w) * k;
        h ^= h >> 29;
        s += 8;
        len -= 8;
    }
    uint64_t w = 0;
    memcpy(&w, s, len);
    h = (h ^ w) * k;
    h ^= h >> 32;
    h *= 0xd6e8feb86659fd93u;
    return h ^ h >> 32;
}

static uint64_t hash_pair(uint32_t left, uint32_t right)
{
    uint64_t h = ((uint64_t)left << 32 | right) * 0x9e3779b97f4a7c15u;
    h ^= h >> 32;
    h *= 0xd6e8feb86659fd93u;
    return h ^ h >> 32;
}

/* A power of two that leaves at least a third of the slots free. */
static size_t table_size(size_t n)
{
    size_t size = 16;
    while (size < n + n / 2)
        size *= 2;
    return size;
}

enum rt_status rt_vocab_init(struct rt_vocab *v, uint32_t n_ids, size_t n_bpe, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const size_t slots = table_size(n_bpe);
    memset(v, 0, sizeof *v);
    RT_TRY(rt_alloc(n_ids, sizeof *v->token, "token table", &v->token, err));
    RT_TRY(rt_alloc(slots, sizeof *v->slot, "token index", &v->slot, err));
    v->n_ids = n_ids;
    v->mask = slots - 1;
out:
    if (st != RT_OK)
        rt_vocab_free(v);
    return st;
}

void rt_vocab_free(struct rt_vocab *v)
{
    rt_free(v->token);
    rt_free(v->slot);
    rt_buf_free(&v->pool);
    memset(v, 0, sizeof *v);
}

/* The slot that holds these bytes, or the free one where they belong. */
static size_t vocab_slot(const struct rt_vocab *v, const char *bytes, size_t len)
{
    size_t i = hash_bytes(bytes, len) & v->mask;
    while (v->slot[i] != 0) {
        const struct rt_token *t = &v->token[v->slot[i] - 1];
        if (t->len == len && memcmp(v->pool.data + t->off, bytes, len) == 0)
            break;
        i = (i + 1) & v->mask;
    }
    return i;
}

enum rt_status rt_vocab_put(struct rt_vocab *v, uint32_t id, const char *bytes, size_t len, uint8_t flags, struct rt_err *err)
{
    struct rt_token *t = &v->token[id];
    size_t slot = 0;
    if (t->flags != 0)
        return rt_fail(err, RT_FORMAT, "two tokens have the id %u", id);
    if (v->pool.len > UINT32_MAX - len)
        return rt_fail(err, RT_FORMAT, "tokens hold more than 4 GiB");
    if (flags & RT_TOKEN_BPE) {
        slot = vocab_slot(v, bytes, len);
        if (v->slot[slot] != 0)
            return rt_fail(err, RT_FORMAT, "the tokens %u and %u have the same bytes", v->slot[slot] - 1, id);
    }
    const uint32_t off = (uint32_t)v->pool.len;
    const enum rt_status st = rt_buf_append(&v->pool, bytes, len, err);
    if (st != RT_OK)
        return st;
    *t = (struct rt_token){.off = off, .len = (uint16_t)len, .flags = flags | RT_TOKEN_USED};
    if (flags & RT_TOKEN_BPE)
        v->slot[slot] = id + 1;
    return RT_OK;
}

bool rt_vocab_find(const struct rt_vocab *v, const char *bytes, size_t len, uint32_t *id)
{
    const uint32_t at = v->slot[vocab_slot(v, bytes, len)];
    if (at == 0)
        return false;
    *id = at - 1;
    return true;
}

enum rt_status rt_bpe_create(const struct rt_vocab *v, size_t n_merges, bool ignore_merges, struct rt_bpe **out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_bpe *b = NULL;
    const size_t slots = table_size(n_merges);
    RT_TRY(rt_alloc(1, sizeof *b, "BPE", &b, err));
    b->vocab = v;
    b->ignore_merges = ignore_merges;
    b->mask = slots - 1;
    RT_TRY(rt_alloc(slots, sizeof *b->merge, "merges", &b->merge, err));
    memset(b->merge, 0xff, slots * sizeof *b->merge);
    RT_TRY(rt_alloc(CACHE_SLOTS, sizeof *b->cache, "cache of words", &b->cache, err));
    for (int c = 0; c < 256; c++) {
        const char byte = (char)c;
        if (!rt_vocab_find(v, &byte, 1, &b->byte_id[c]))
            RT_FAIL(err, FORMAT, "the vocabulary has no token for the byte 0x%02x: a byte-level vocabulary has all 256", c);
    }
    *out = b;
    b = NULL;
out:
    rt_bpe_free(b);
    return st;
}

void rt_bpe_free(struct rt_bpe *b)
{
    if (b == NULL)
        return;
    rt_free(b->merge);
    rt_free(b->cache);
    rt_buf_free(&b->symbols);
    rt_buf_free(&b->heap);
    rt_free(b);
}

static struct merge *merge_slot(const struct rt_bpe *b, uint32_t left, uint32_t right)
{
    size_t i = hash_pair(left, right) & b->mask;
    while (b->merge[i].left != NONE && (b->merge[i].left != left || b->merge[i].right != right))
        i = (i + 1) & b->mask;
    return &b->merge[i];
}

void rt_bpe_merge(struct rt_bpe *b, uint32_t left, uint32_t right, uint32_t rank, uint32_t made)
{
    *merge_slot(b, left, right) = (struct merge){.left = left, .right = right, .rank = rank, .made = made};
}

static bool before(const struct candidate *a, const struct candidate *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->pos < b->pos;
}

/* The heap has room for every candidate of a word: n-1 at first, two more a merge. */
static void heap_push(struct rt_bpe *b, uint32_t left, uint32_t right, uint32_t pos)
{
    struct candidate *h = (struct candidate *)b->heap.data;
    const struct merge *m = merge_slot(b, left, right);
    if (m->left == NONE)
        return;
    const struct candidate c = {.rank = m->rank, .pos = pos, .made = m->made};
    size_t i = b->n_heap++;
    while (i > 0 && before(&c, &h[(i - 1) / 2])) {
        h[i] = h[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    h[i] = c;
}

static struct candidate heap_pop(struct rt_bpe *b)
{
    struct candidate *h = (struct candidate *)b->heap.data;
    const struct candidate top = h[0], last = h[--b->n_heap];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= b->n_heap)
            break;
        if (child + 1 < b->n_heap && before(&h[child + 1], &h[child]))
            child++;
        if (!before(&h[child], &last))
            break;
        h[i] = h[child];
        i = child;
    }
    h[i] = last;
    return top;
}

static enum rt_status reserve(struct rt_buf *buf, size_t bytes, struct rt_err *err)
{
    return buf->cap >= bytes ? RT_OK : rt_buf_reserve(buf, bytes, err);
}

static enum rt_status merge_word(struct rt_bpe *b, const char *word, size_t len, uint32_t *ids, size_t *n, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    RT_TRY(reserve(&b->symbols, len * sizeof(struct symbol), err));
    RT_TRY(reserve(&b->heap, 3 * len * sizeof(struct candidate), err));
    struct symbol *s = (struct symbol *)b->symbols.data;
    for (uint32_t i = 0; i < len; i++)
        s[i] = (struct symbol){b->byte_id[(uint8_t)word[i]], i == 0 ? NONE : i - 1, i + 1 == len ? NONE : i + 1};
    b->n_heap = 0;
    for (uint32_t i = 0; i + 1 < len; i++)
        heap_push(b, s[i].id, s[i + 1].id, i);

    while (b->n_heap > 0) {
        const struct candidate c = heap_pop(b);
        struct symbol *left = &s[c.pos];
        if (left->id == NONE || left->next == NONE)
            continue;
        struct symbol *right = &s[left->next];
        const struct merge *m = merge_slot(b, left->id, right->id);
        if (m->left == NONE || m->made != c.made) /* one of the two was merged elsewhere since */
            continue;
        left->id = c.made;
        right->id = NONE;
        left->next = right->next;
        if (right->next != NONE) {
            s[right->next].prev = c.pos;
            heap_push(b, left->id, s[right->next].id, c.pos);
        }
        if (left->prev != NONE)
            heap_push(b, s[left->prev].id, left->id, left->prev);
    }

    size_t made = 0;
    for (uint32_t i = 0; i != NONE; i = s[i].next)
        ids[made++] = s[i].id;
    *n = made;
out:
    return st;
}

enum rt_status rt_bpe_encode(struct rt_bpe *b, const char *word, size_t len, uint32_t *ids, size_t *n, struct rt_err *err)
{
    *n = 0;
    if (len == 0)
        return RT_OK;
    if (len > RT_WORD_MAX)
        return rt_fail(err, RT_FORMAT, "a word of %zu bytes: the pre-tokenizer must cut text into words of at most %d bytes", len,
                       (int)RT_WORD_MAX);
    struct cached *c = NULL;
    uint64_t hash = 0;
    if (len <= CACHE_BYTES) {
        hash = hash_bytes(word, len);
        c = &b->cache[hash & (CACHE_SLOTS - 1)];
        if (c->n > 0 && c->hash == hash && c->len == len && memcmp(c->word, word, len) == 0) {
            memcpy(ids, c->ids, c->n * sizeof *ids);
            *n = c->n;
            return RT_OK;
        }
    }
    if (b->ignore_merges && rt_vocab_find(b->vocab, word, len, ids)) {
        *n = 1;
    } else {
        const enum rt_status st = merge_word(b, word, len, ids, n, err);
        if (st != RT_OK)
            return st;
    }
    if (c != NULL && *n <= CACHE_IDS) {
        c->hash = hash;
        c->len = (uint8_t)len;
        c->n = (uint8_t)*n;
        memcpy(c->word, word, len);
        memcpy(c->ids, ids, *n * sizeof *ids);
    }
    return RT_OK;
}
