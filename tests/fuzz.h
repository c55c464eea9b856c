/* Mutation fuzzing: small files of each kind, damaged at random, into their parsers.
 *
 * Input i of a target is a function of (target, i) alone: a failure is repeated by its number. A case passes when the parser answers
 * OK or a typed error with a message, asked for no memory that the file does not justify, and came back. Crashes, leaks and
 * undefined behaviour are for the sanitizers to see (`make fuzz`).
 */
#ifndef RT_TESTS_FUZZ_H
#define RT_TESTS_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/mem.h"
#include "core/status.h"

enum { FUZZ_MAX_SEEDS = 32, FUZZ_MAX_INPUT = 1 << 16 };

struct fuzz_seeds {
    struct rt_buf at[FUZZ_MAX_SEEDS];
    int n;
};
void fuzz_seed(struct fuzz_seeds *s, const void *data, size_t n);
/* A file from the repository root, or one that was just written. */
void fuzz_seed_file(struct fuzz_seeds *s, const char *path);

struct fuzz_target {
    const char *name;
    int iterations;            /* of `make test` */
    const char *const *words;  /* dictionary, NULL at the end; or NULL */
    size_t extra;              /* bytes that a case may hold whatever its size */
    void (*begin)(struct fuzz_seeds *s); /* makes seeds, and what run needs around the input */
    void (*repair)(uint8_t *data, size_t n); /* NULL, or makes the checksums right again, for half of the inputs */
    /* Hands the input to the parser. Failed checks of its own: fuzz_fail. */
    enum rt_status (*run)(const uint8_t *data, size_t n, struct rt_err *err);
    void (*end)(void);         /* or NULL */
};

extern const struct fuzz_target fuzz_json, fuzz_safetensors, fuzz_index, fuzz_shard, fuzz_manifest, fuzz_identity, fuzz_teacher_config,
    fuzz_student_config, fuzz_checkpoint, fuzz_run_config, fuzz_arguments; /* fuzz_files.c */
extern const struct fuzz_target fuzz_tokenizer, fuzz_encode, fuzz_template, fuzz_dataset, fuzz_jsonl, fuzz_verify; /* fuzz_text.c */
extern const struct fuzz_target fuzz_inspect, fuzz_record, fuzz_metrics; /* fuzz_commands.c */
extern const struct fuzz_target fuzz_state, fuzz_hold; /* fuzz_state.c */
extern const struct fuzz_target fuzz_retarget; /* fuzz_retarget.c */
extern const struct fuzz_target *const fuzz_targets[]; /* all of them, NULL at the end */

/* Beyond what the file justifies: a reader's fixed buffers (a megabyte of a checkpoint's file, the planes of a block); and tables by
 * the largest id that a tokenizer may have (2^20 ids of 24 bytes, twice). */
enum { FUZZ_READER = 2 << 20, FUZZ_IDS = 64 << 20 };

/* The directory of the target that runs: made (and made current), its path, a path inside it (a ring of 4). */
void fuzz_dir(const char *name);
const char *fuzz_place(void);
const char *fuzz_at(const char *name);
/* For preparations: ends the program where st is not OK. */
void fuzz_must(enum rt_status st, const struct rt_err *err);

/* Runs inputs first .. first+n, or for `seconds` if n is 0. NULL, or what went wrong with which input. */
const char *fuzz_run(const struct fuzz_target *t, int64_t first, int64_t n, double seconds, int64_t *done);
/* Makes the case that is being run fail. */
void fuzz_fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* Writes an input where it is asked for: DIR/NAME. */
void fuzz_put(const char *path, const uint8_t *data, size_t n);

/* retort-tests --fuzz list | TARGET SECONDS [FIRST] */
int rt_fuzz_main(int argc, char **argv);

/* tests/fuzz_shard.c: checksums of a shard */
void fuzz_repair_shard(uint8_t *data, size_t n);

#endif
