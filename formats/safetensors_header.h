/* The header of one safetensors file. */
#ifndef RT_FORMATS_SAFETENSORS_HEADER_H
#define RT_FORMATS_SAFETENSORS_HEADER_H

#include <stddef.h>

#include "formats/safetensors.h"

enum { RT_ST_MAX_HEADER = 100000000 };

struct rt_st_list {
    struct rt_tensor *at; /* [n], ascending offset; names point into the text; rt_free */
    int64_t n;
};

/* text [len + 1]: the header's JSON, terminated by 0; unescaped in place, and has to outlive the list. data_bytes: what the
 * file holds behind it. Offsets in the list count from the data. Checks everything that one header can be wrong in. */
enum rt_status rt_st_header_parse(char *text, size_t len, uint64_t data_bytes, const char *path, struct rt_st_list *out,
                                  struct rt_err *err);
/* bytes = product of ne times the size of dtype; false on overflow of int64 or a negative dimension. */
bool rt_st_bytes(enum rt_dtype dtype, int ndim, const int64_t *ne, uint64_t *bytes);

#endif
