/* Work that is done while allocations fail: shared by the suites of faults. */
#ifndef RT_TESTS_FAULTS_H
#define RT_TESTS_FAULTS_H

#include "core/status.h"
#include "tests/fault_alloc.h"
#include "tests/suite.h"

/* Some work that cleans up after itself, and a digest of what came of it (0 at the start). */
typedef enum rt_status (*fault_work)(void *ctx, uint64_t *digest, struct rt_err *err);
/* digest += n bytes */
void fault_digest(uint64_t *digest, const void *data, size_t n);
/* Runs the work with allocation 1, 2, ... failing, alone and with all later ones; at most about `most` of each, evenly spread.
 * Fails the test unless every outcome is NOMEM with a message or the result without a fault. */
void fault_each(fault_work work, void *ctx, int64_t most);

#endif
