/* Rows made by the definitions of formats/rows.h, and sets of them on disk: shared by the suites of shards. */
#ifndef RT_TESTS_SHARD_FIXTURE_H
#define RT_TESTS_SHARD_FIXTURE_H

#include "formats/shard.h"
#include "tests/suite.h"

/* Rows as a teacher would make them: from logits over all ids that exist, by the definitions of formats/rows.h. */
enum { SF_MAX_TOKENS = 400, SF_MAX_K = 64, SF_MAX_IDS = 97 };
struct sf_made {
    struct rt_rows rows;
    uint32_t ids[SF_MAX_TOKENS], ends[SF_MAX_TOKENS], pos[SF_MAX_TOKENS], topk_ids[SF_MAX_TOKENS * SF_MAX_K], next[SF_MAX_TOKENS], rank[SF_MAX_TOKENS];
    uint8_t mask[SF_MAX_TOKENS];
    char text[SF_MAX_TOKENS * 4];
    float logits[SF_MAX_TOKENS * SF_MAX_K], lse[SF_MAX_TOKENS * RT_MAX_LSE], logprob[SF_MAX_TOKENS], scale[SF_MAX_TOKENS];
    uint16_t state[SF_MAX_TOKENS * 8];
    uint8_t code[SF_MAX_TOKENS * 4];
};

/* Of a teacher of SF_MAX_IDS ids: three temperatures, no features. */
struct rt_row_identity sf_identity(int k);
/* BF16 states of layer 3, [8]; E4M3 with scales of the final norm, [4]. */
void sf_add_features(struct rt_row_identity *id);

/* Sequence i with its rows; freed with free. */
struct sf_made *sf_make(const struct rt_row_identity *id, int i, int64_t n_tokens);
/* Tokens of sequence i in a set. */
int64_t sf_length_of(int i);

extern const struct rt_shard_options sf_small; /* a few sequences a shard */
/* Writes sequences up to n, from wherever the set stands; status of the first thing that fails. stop: kill -9 after that put. */
enum rt_status sf_write_set(const char *dir, const struct rt_row_identity *id, const struct rt_shard_options *opt, int n, int stop,
                            struct rt_err *err);
/* Every sequence of a set or shard is read; status of the first thing that fails. */
enum rt_status sf_read_whole(const char *path, struct rt_err *err);

#endif
