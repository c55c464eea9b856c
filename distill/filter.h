/* Filtering of traces, ours or anyone's: each line of the input goes to OUT/accepted.jsonl or OUT/rejected.jsonl with a "filter" member.
 *
 * Read are {"prompt","completion"} and {"messages"} whose last one is the assistant's, its thought in "reasoning_content" or between
 * think tags. Checks, in this order; the first that a line fails is its reason:
 *   unfinished    finish_reason (also in "sampling") is there and is none of stop, eos, end_turn, stop_sequence; the completion is
 *                 empty, or opens a thought that it does not close
 *   format        not exactly one <think> and one </think> behind it, the first at the start (a completion that begins with
 *                 </think>, as the V3.1 template forces without thought, is fine; so is reasoning_content with no tags at all)
 *   length        outside min_length .. max_length, in tokens with a tokenizer, else in characters
 *   language      the prompt is mostly in one script, and the completion is not: over 10 % of its letters are of scripts foreign to
 *                 a Latin prompt, or under 30 % of the script of another one (formulas are Latin everywhere)
 *   repetition    some 32 words in a row occur 8 times or more
 *   wrong         the answer was understood and is not the reference's (verify.h)
 *   unparsed      no answer found, or one that could not be compared
 *   duplicate     prompt and completion, but for case and white space, are those of an earlier accepted line
 *   contaminated  the prompt (without one, the text) shares 13 words in a row with a prompt of the file `against`; one shorter than that: 95 % similar (twice
 *                 the longest common subsequence over both lengths), with the same numbers
 * A line without "answer" is not verified, and counted. Orders and bounds: what open recipes use.
 */
#ifndef RT_DISTILL_FILTER_H
#define RT_DISTILL_FILTER_H

#include <stdbool.h>
#include <stdint.h>

#include "core/log.h"
#include "core/status.h"
#include "distill/verify.h"
#include "formats/json.h"
#include "formats/tokenizer.h"

enum rt_filter_reason {
    RT_REJECT_UNFINISHED,
    RT_REJECT_FORMAT,
    RT_REJECT_LENGTH,
    RT_REJECT_LANGUAGE,
    RT_REJECT_REPETITION,
    RT_REJECT_WRONG,
    RT_REJECT_UNPARSED,
    RT_REJECT_DUPLICATE,
    RT_REJECT_CONTAMINATED,
    RT_REJECT_COUNT, /* accepted */
};
const char *rt_filter_reason_name(enum rt_filter_reason r); /* "unfinished", ...; "accepted" */
#define RT_FILTER_NAMES "unfinished,format,length,language,repetition,wrong,unparsed,duplicate,contaminated"

/* "wrong,unparsed" -> a bit a reason; "all" and "none" too; NULL: all. USAGE names what is unknown. */
enum rt_status rt_filter_parse_drop(const char *list, unsigned *drop, struct rt_err *err);

struct rt_filter_options {
    const char *data;          /* a file, or a directory with traces.jsonl (else accepted.jsonl) */
    const char *out;           /* a directory, made if absent; both files are replaced at the end, together with their counts */
    unsigned drop;             /* bits of the reasons for which a line is rejected */
    enum rt_verify_mode verify;
    int64_t min_length, max_length; /* 0: no bound */
    struct rt_tokenizer *tok;  /* NULL: lengths in characters */
    const char *against;       /* NULL, or JSON lines with prompts that must not be trained on */
    struct rt_log *log;
    bool dry_run;              /* only count: nothing is written */
    bool (*stop)(void *self);  /* or NULL; true: INTERRUPTED, nothing is published */
    void *stop_self;
};

/* Whether each reason that `list` names can be found, and what was given for one is used. "all" names none. USAGE says what to add. */
enum rt_status rt_filter_check(const struct rt_filter_options *o, const char *list, struct rt_err *err);

struct rt_filter_counts {
    int64_t lines, by_reason[RT_REJECT_COUNT + 1]; /* the last: accepted */
    int64_t verdict[3], unverified;                /* of lines that got as far as verification */
};

/* Publishes OUT/accepted.jsonl and OUT/rejected.jsonl, each line with "filter": {"reason": text|null, "detail": text, "verdict":
 * "correct"|"wrong"|"unparsed"|null, "found": the answer that was compared}. FORMAT "FILE:LINE: ..." for a line of no such form. */
enum rt_status rt_filter_run(const struct rt_filter_options *o, struct rt_filter_counts *counts, struct rt_err *err);
/* Table of the counts, to the log. */
void rt_filter_report(const struct rt_filter_counts *c, const struct rt_filter_options *o);
enum rt_status rt_filter_counts_json(const struct rt_filter_counts *c, struct rt_json *to, struct rt_err *err);

#endif
