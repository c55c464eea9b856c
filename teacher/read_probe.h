/* How fast a checkpoint's files are read, and by how many threads: measured on the files themselves, past the page cache, as passes read them. */
#ifndef RT_TEACHER_READ_PROBE_H
#define RT_TEACHER_READ_PROBE_H

#include <stdint.h>

#include "core/status.h"
#include "formats/safetensors.h"

enum { RT_READ_COUNTS = 5 };
struct rt_read_probe {
    int readers[RT_READ_COUNTS];   /* least, twice, four times as many .. as far as `most` and 16 go */
    double rate[RT_READ_COUNTS];   /* bytes a second of each */
    int n;
    int best;                      /* index of the fewest that come within a twentieth of the greatest rate; -1: nothing was measured */
};
/* Reads for `seconds` with each count of threads, each time another stretch of the files. Files too small to tell (below 64 MiB each): n 0. NOMEM. */
enum rt_status rt_read_probe(const struct rt_tensors *ts, int least, int most, double seconds, struct rt_read_probe *out, struct rt_err *err);

#endif
