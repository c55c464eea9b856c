/* tokenizer.json and tokenizer_config.json -> struct rt_tokenizer. */
#include <string.h>

#include "core/io.h"
#include "core/sha256.h"
#include "formats/json.h"
#include "formats/tokenizer_internal.h"
#include "formats/unicode.h"

enum { FILE_MAX = 64 << 20, CONFIG_MAX = 16 << 20, CONTENT_MAX = RT_TOKEN_MAX_BYTES };

/* GPT-2's alphabet: a token is written with one printable character a byte. code[c] = 1 + the byte that character c stands for. */
struct alphabet {
    uint16_t code[0x144];
};

static void alphabet_init(struct alphabet *a)
{
    int next = 0x100;
    memset(a, 0, sizeof *a);
    for (int b = 0; b < 256; b++) {
        const bool printable = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
        a->code[printable ? b : next++] = (uint16_t)(b + 1);
    }
}

/* The bytes that a token's text stands for; false where a character is not of the alphabet, or over RT_TOKEN_MAX_BYTES. */
static bool to_bytes(const struct alphabet *a, const char *s, size_t len, char out[RT_TOKEN_MAX_BYTES], size_t *n)
{
    *n = 0;
    for (size_t i = 0, k; i < len; i += k) {
        const uint32_t c = rt_utf8_next(s + i, len - i, &k);
        if (c >= sizeof a->code / sizeof a->code[0] || a->code[c] == 0 || *n == RT_TOKEN_MAX_BYTES)
            return false;
        out[(*n)++] = (char)(a->code[c] - 1);
    }
    return true;
}

static enum rt_status check_model(const struct rt_json *model, struct rt_err *err)
{
    static const char *const affix[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    enum rt_status st = RT_OK;
    const char *text;
    double dropout;
    if (model == NULL || rt_json_typeof(model) != RT_JSON_OBJECT)
        RT_FAIL(err, FORMAT, "no \"model\" in it");
    RT_TRY(rt_json_string_or(model, "type", "BPE", &text, err));
    if (strcmp(text, "BPE") != 0)
        RT_FAIL(err, UNSUPPORTED, "the model type '%.40s' is not known: byte-level BPE is", text);
    RT_TRY(rt_json_double_or(model, "dropout", 0, &dropout, err));
    if (dropout != 0)
        RT_FAIL(err, UNSUPPORTED, "BPE with dropout %g is not known", dropout);
    for (int i = 0; i < 2; i++) {
        RT_TRY(rt_json_string_or(model, affix[i], "", &text, err));
        if (text[0] != '\0')
            RT_FAIL(err, UNSUPPORTED, "BPE with a %s ('%.40s') is not known", affix[i], text);
    }
out:
    return st;
}

static enum rt_status read_normalizer(struct rt_tokenizer *t, const struct rt_json *v, int depth, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const char *type;
    if (v == NULL || rt_json_typeof(v) == RT_JSON_NULL)
        return RT_OK;
    RT_TRY(rt_json_string(v, "type", &type, err));
    if (strcmp(type, "NFC") == 0) {
        t->nfc = true;
    } else if (strcmp(type, "Sequence") == 0 && depth < 4) {
        const struct rt_json *list = rt_json_get(v, "normalizers");
        if (list == NULL || rt_json_typeof(list) != RT_JSON_ARRAY)
            RT_FAIL(err, FORMAT, "a normalizer Sequence without \"normalizers\"");
        for (size_t i = 0; i < rt_json_len(list); i++)
            RT_TRY(read_normalizer(t, rt_json_at(list, i), depth + 1, err));
    } else {
        RT_FAIL(err, UNSUPPORTED, "the normalizer '%.40s' is not known: none and NFC are", type);
    }
out:
    return st;
}

static enum rt_status check_decoder(const struct rt_json *v, struct rt_err *err)
{
    const char *type = rt_json_as_string(rt_json_get(v, "type"), NULL);
    if (type == NULL || strcmp(type, "ByteLevel") != 0)
        return rt_fail(err, RT_UNSUPPORTED, "the decoder '%.40s' is not known: ByteLevel is", type ? type : "none");
    return RT_OK;
}

/* Ids of both lists in range; *n_ids = 1 + the largest. */
static enum rt_status measure(const struct rt_json *vocab, const struct rt_json *added, uint32_t *n_ids, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const char *key;
    const struct rt_json *value;
    int64_t id, max = -1;
    if (vocab == NULL || rt_json_typeof(vocab) != RT_JSON_OBJECT || rt_json_len(vocab) == 0)
        RT_FAIL(err, FORMAT, "no \"vocab\" in its model");
    if (added != NULL && rt_json_typeof(added) != RT_JSON_ARRAY && rt_json_typeof(added) != RT_JSON_NULL)
        RT_FAIL(err, FORMAT, "its \"added_tokens\" is no list");
    for (size_t i = 0; rt_json_member(vocab, i, &key, &value); i++) {
        if (!rt_json_as_int(value, &id) || id < 0 || id >= RT_TOKENIZER_MAX_IDS)
            RT_FAIL(err, FORMAT, "the id of token '%.40s' is not an integer in 0..%d", key, RT_TOKENIZER_MAX_IDS - 1);
        max = id > max ? id : max;
    }
    for (size_t i = 0; i < rt_json_len(added); i++) {
        RT_TRY(rt_json_int(rt_json_at(added, i), "id", 0, RT_TOKENIZER_MAX_IDS - 1, &id, err));
        max = id > max ? id : max;
    }
    *n_ids = (uint32_t)(max + 1);
out:
    return st;
}

static enum rt_status read_vocab(struct rt_tokenizer *t, const struct alphabet *a, const struct rt_json *vocab, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const char *key;
    const struct rt_json *value;
    char bytes[RT_TOKEN_MAX_BYTES];
    size_t n;
    for (size_t i = 0; rt_json_member(vocab, i, &key, &value); i++) {
        const size_t len = strlen(key);
        int64_t id = 0;
        rt_json_as_int(value, &id);
        if (to_bytes(a, key, len, bytes, &n)) {
            if (n == 0)
                RT_FAIL(err, FORMAT, "the token %d is empty", (int)id);
            RT_TRY(rt_vocab_put(&t->vocab, (uint32_t)id, bytes, n, RT_TOKEN_BPE, err));
        } else {
            /* not written in the alphabet: BPE cannot make it, and it decodes to its own text */
            if (len > RT_TOKEN_MAX_BYTES)
                RT_FAIL(err, FORMAT, "the token %d has more than %d bytes", (int)id, (int)RT_TOKEN_MAX_BYTES);
            RT_TRY(rt_vocab_put(&t->vocab, (uint32_t)id, key, len, RT_TOKEN_USED, err));
        }
    }
out:
    return st;
}

/* One of the merges "a b" or ["a", "b"]: its two texts. */
static bool merge_parts(const struct rt_json *m, const char *part[2], size_t len[2])
{
    size_t n;
    const char *s = rt_json_as_string(m, &n), *space;
    if (s == NULL) {
        part[0] = rt_json_as_string(rt_json_at(m, 0), &len[0]);
        part[1] = rt_json_as_string(rt_json_at(m, 1), &len[1]);
        return rt_json_len(m) == 2 && part[0] != NULL && part[1] != NULL;
    }
    space = memchr(s, ' ', n);
    if (space == NULL || memchr(space + 1, ' ', n - (size_t)(space - s) - 1) != NULL)
        return false;
    part[0] = s;
    len[0] = (size_t)(space - s);
    part[1] = space + 1;
    len[1] = n - len[0] - 1;
    return true;
}

static enum rt_status read_merges(struct rt_tokenizer *t, const struct alphabet *a, const struct rt_json *merges, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char bytes[2 * RT_TOKEN_MAX_BYTES];
    for (size_t i = 0; i < rt_json_len(merges); i++) {
        const char *part[2];
        size_t len[2], n0, n1;
        uint32_t left, right, made;
        if (!merge_parts(rt_json_at(merges, i), part, len))
            RT_FAIL(err, FORMAT, "merge %zu is no pair of tokens", i);
        if (!to_bytes(a, part[0], len[0], bytes, &n0) || !rt_vocab_find(&t->vocab, bytes, n0, &left))
            RT_FAIL(err, FORMAT, "merge %zu: '%.*s' is no token of the vocabulary", i, (int)(len[0] < 40 ? len[0] : 40), part[0]);
        if (!to_bytes(a, part[1], len[1], bytes + n0, &n1) || !rt_vocab_find(&t->vocab, bytes + n0, n1, &right))
            RT_FAIL(err, FORMAT, "merge %zu: '%.*s' is no token of the vocabulary", i, (int)(len[1] < 40 ? len[1] : 40), part[1]);
        if (!rt_vocab_find(&t->vocab, bytes, n0 + n1, &made))
            RT_FAIL(err, FORMAT, "merge %zu: the tokens %u and %u joined are no token of the vocabulary", i, left, right);
        rt_bpe_merge(t->bpe, left, right, (uint32_t)i, made);
    }
out:
    return st;
}

/* Puts an added token into the table. An id that the vocabulary has must have the same text there. */
static enum rt_status place_added(struct rt_tokenizer *t, const struct alphabet *a, const struct rt_json *vocab, uint32_t id,
                                  const char *content, size_t len, bool special, struct rt_err *err)
{
    const uint8_t flags = (uint8_t)(RT_TOKEN_ADDED | (special ? RT_TOKEN_SPECIAL : 0));
    struct rt_token *k = &t->vocab.token[id];
    int64_t known;
    char bytes[RT_TOKEN_MAX_BYTES];
    size_t n;
    /* a key of the vocabulary is text without zero bytes */
    if (strlen(content) == len && rt_json_as_int(rt_json_get(vocab, content), &known) && known != id)
        return rt_fail(err, RT_FORMAT, "the added token '%.60s' has the id %u, but %d in the vocabulary", content, id, (int)known);
    if (k->flags == 0)
        return rt_vocab_put(&t->vocab, id, content, len, flags, err);
    const bool bpe = (k->flags & RT_TOKEN_BPE) != 0 && to_bytes(a, content, len, bytes, &n);
    if ((k->flags & RT_TOKEN_ADDED) != 0 || k->len != (bpe ? n : len) ||
        memcmp(t->vocab.pool.data + k->off, bpe ? bytes : content, k->len) != 0)
        return rt_fail(err, RT_FORMAT, "the added token '%.60s' has the id %u of another token", content, id);
    k->flags |= flags;
    return RT_OK;
}

static enum rt_status read_added(struct rt_tokenizer *t, const struct alphabet *a, const struct rt_json *vocab,
                                 const struct rt_json *added, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const size_t n = rt_json_len(added);
    size_t *offset = NULL, raw = 0, normal;
    RT_TRY(rt_alloc(n, sizeof *offset, "added tokens", &offset, err));
    RT_TRY(rt_alloc(n, sizeof(struct rt_added), "added tokens", &t->raw.token, err));
    RT_TRY(rt_alloc(n, sizeof(struct rt_added), "added tokens", &t->normalized.token, err));
    for (size_t i = 0; i < n; i++) {
        const struct rt_json *v = rt_json_at(added, i);
        size_t len = 0;
        int64_t id;
        bool special, normalized;
        struct rt_added k = {0};
        const char *content = rt_json_as_string(rt_json_get(v, "content"), &len);
        if (content == NULL)
            RT_FAIL(err, FORMAT, "the added token %zu has no \"content\"", i);
        if (len > CONTENT_MAX)
            RT_FAIL(err, FORMAT, "the added token %zu has %zu bytes: at most %d", i, len, (int)CONTENT_MAX);
        RT_TRY(rt_json_int(v, "id", 0, RT_TOKENIZER_MAX_IDS - 1, &id, err));
        RT_TRY(rt_json_bool_or(v, "special", false, &special, err));
        RT_TRY(rt_json_bool_or(v, "normalized", !special, &normalized, err));
        RT_TRY(rt_json_bool_or(v, "single_word", false, &k.single_word, err));
        RT_TRY(rt_json_bool_or(v, "lstrip", false, &k.lstrip, err));
        RT_TRY(rt_json_bool_or(v, "rstrip", false, &k.rstrip, err));
        RT_TRY(place_added(t, a, vocab, (uint32_t)id, content, len, special, err));
        if (len == 0) /* never found in a text */
            continue;
        const size_t at = t->added_text.len;
        RT_TRY(normalized && t->nfc ? rt_nfc(content, len, &t->added_text, err)
                                    : rt_buf_append(&t->added_text, content, len, err));
        k.len = (uint32_t)(t->added_text.len - at);
        k.id = (uint32_t)id;
        struct rt_finder *f = normalized ? &t->normalized : &t->raw;
        /* raw ones are counted from the front of `offset`, the others from its back, until the text stands still */
        offset[normalized ? n - 1 - f->n : f->n] = at;
        f->token[f->n++] = k;
    }
    for (raw = 0; raw < t->raw.n; raw++)
        t->raw.token[raw].text = t->added_text.data + offset[raw];
    for (normal = 0; normal < t->normalized.n; normal++)
        t->normalized.token[normal].text = t->added_text.data + offset[n - 1 - normal];
    RT_TRY(rt_finder_build(&t->raw, err));
    RT_TRY(rt_finder_build(&t->normalized, err));
out:
    rt_free(offset);
    return st;
}

/* Whether the post-processor begins a text with a special token, and which one. */
static void read_post_processor(struct rt_tokenizer *t, const struct rt_json *v, int depth)
{
    const char *type = rt_json_as_string(rt_json_get(v, "type"), NULL);
    const struct rt_json *list = rt_json_get(v, "processors");
    int64_t id;
    if (type == NULL || depth > 4)
        return;
    if (strcmp(type, "Sequence") == 0) {
        for (size_t i = 0; i < rt_json_len(list); i++)
            read_post_processor(t, rt_json_at(list, i), depth + 1);
    } else if (strcmp(type, "TemplateProcessing") == 0) {
        const struct rt_json *first = rt_json_get(rt_json_at(rt_json_get(v, "single"), 0), "SpecialToken");
        const char *name = rt_json_as_string(rt_json_get(first, "id"), NULL);
        const struct rt_json *ids = name ? rt_json_get(rt_json_get(rt_json_get(v, "special_tokens"), name), "ids") : NULL;
        if (rt_json_len(ids) == 1 && rt_json_as_int(rt_json_at(ids, 0), &id) && id >= 0 && id < t->vocab.n_ids &&
            t->vocab.token[id].flags != 0) {
            t->add_bos = true;
            t->bos = id;
        }
    }
}

/* The id of a token named as "bos_token": "text" or {"content": "text"}; -1 without one. */
static int64_t named_token(const struct rt_tokenizer *t, const struct rt_json *config, const char *key)
{
    size_t len;
    uint32_t id;
    const struct rt_json *v = rt_json_get(config, key);
    const char *s = rt_json_as_string(v, &len);
    if (s == NULL)
        s = rt_json_as_string(rt_json_get(v, "content"), &len);
    return s != NULL && rt_tokenizer_find(t, s, len, &id) ? (int64_t)id : -1;
}

static enum rt_status read_config(struct rt_tokenizer *t, const char *path, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_json *config = NULL;
    RT_TRY(rt_json_load(path, CONFIG_MAX, &config, err));
    const int64_t bos = named_token(t, config, "bos_token");
    if (bos >= 0)
        t->bos = bos;
    t->eos = named_token(t, config, "eos_token");
    t->pad = named_token(t, config, "pad_token");
    RT_TRY(rt_json_bool_or(config, "add_bos_token", t->add_bos, &t->add_bos, err));
    if (t->bos < 0)
        t->add_bos = false;
out:
    rt_json_free(config);
    return st;
}

static enum rt_status build(struct rt_tokenizer *t, const struct rt_json *root, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct alphabet a;
    bool ignore_merges;
    uint32_t n_ids = 0;
    const struct rt_json *model = rt_json_get(root, "model"), *added = rt_json_get(root, "added_tokens");
    const struct rt_json *vocab = rt_json_get(model, "vocab"), *merges = rt_json_get(model, "merges");
    alphabet_init(&a);
    RT_TRY(check_model(model, err));
    RT_TRY(rt_json_bool_or(model, "ignore_merges", false, &ignore_merges, err));
    RT_TRY(read_normalizer(t, rt_json_get(root, "normalizer"), 0, err));
    RT_TRY(rt_pretokenizer_create(rt_json_get(root, "pre_tokenizer"), &t->pre, err));
    RT_TRY(check_decoder(rt_json_get(root, "decoder"), err));
    RT_TRY(measure(vocab, added, &n_ids, err));
    if (merges == NULL || rt_json_typeof(merges) != RT_JSON_ARRAY || rt_json_len(merges) > RT_TOKENIZER_MAX_MERGES)
        RT_FAIL(err, FORMAT, "its model has no list \"merges\" of at most %d", RT_TOKENIZER_MAX_MERGES);
    RT_TRY(rt_vocab_init(&t->vocab, n_ids, rt_json_len(vocab), err));
    RT_TRY(read_vocab(t, &a, vocab, err));
    RT_TRY(rt_bpe_create(&t->vocab, rt_json_len(merges), ignore_merges, &t->bpe, err));
    RT_TRY(read_merges(t, &a, merges, err));
    RT_TRY(read_added(t, &a, vocab, added, err));
    read_post_processor(t, rt_json_get(root, "post_processor"), 0);
out:
    return st;
}

enum rt_status rt_tokenizer_load(const char *path, struct rt_tokenizer **out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_tokenizer *t = NULL;
    struct rt_buf text = {0};
    struct rt_json *root = NULL;
    char config[4096];
    uint8_t digest[32];
    const bool dir = rt_path_is_dir(path);
    RT_TRY(rt_alloc(1, sizeof *t, "tokenizer", &t, err));
    t->bos = t->eos = t->pad = -1;
    if (dir)
        RT_TRY(rt_path_join(t->path, sizeof t->path, path, "tokenizer.json", err));
    else if (strlen(path) < sizeof t->path)
        strcpy(t->path, path);
    else
        RT_FAIL(err, USAGE, "a path of %zu bytes is too long", strlen(path));
    RT_TRY(rt_file_read_all(t->path, FILE_MAX, &text, err));
    rt_sha256(text.data, text.len, digest);
    rt_hex(t->sha256, digest, sizeof digest);
    RT_TRY(rt_json_parse(text.data, text.len, t->path, &root, err));
    rt_buf_free(&text);
    st = build(t, root, err);
    if (st != RT_OK && err != NULL && strstr(err->msg, t->path) == NULL)
        rt_err_context(err, "%s", t->path);
    RT_TRY(st);
    if (dir) {
        RT_TRY(rt_path_join(config, sizeof config, path, "tokenizer_config.json", err));
        if (rt_path_exists(config))
            RT_TRY(read_config(t, config, err));
    }
    *out = t;
    t = NULL;
out:
    rt_buf_free(&text);
    rt_json_free(root);
    rt_tokenizer_free(t);
    return st;
}

void rt_tokenizer_free(struct rt_tokenizer *t)
{
    if (t == NULL)
        return;
    rt_bpe_free(t->bpe);
    rt_vocab_free(&t->vocab);
    rt_pretokenizer_free(t->pre);
    rt_free(t->raw.token);
    rt_free(t->normalized.token);
    rt_buf_free(&t->added_text);
    rt_buf_free(&t->scratch);
    rt_free(t);
}
