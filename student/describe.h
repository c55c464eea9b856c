/* What a student is, for people and programs; and what it costs. */
#ifndef RT_STUDENT_DESCRIBE_H
#define RT_STUDENT_DESCRIBE_H

#include "formats/json.h"
#include "student/params.h"

/* obj += {"model_type","parameters","matmul_parameters","layers","hidden_size","intermediate_size","heads","kv_heads","head_dim",
 * "vocab_size","tied","rope","max_position","dtype","tensors": [{"name","shape","parameters"}]} (tensors only when asked). */
enum rt_status rt_student_describe(const struct rt_student_config *c, const struct rt_params *p, bool tensors, struct rt_json *obj,
                                   struct rt_err *err);
/* The same as text lines, appended. */
enum rt_status rt_student_describe_text(const struct rt_student_config *c, const struct rt_params *p, bool tensors, struct rt_buf *out,
                                        struct rt_err *err);

/* Training FLOPs a token, forward and backward with nothing computed twice: 6 N + 6 L nh hd len. N: the parameters that a token is
 * multiplied with, head included, embedding lookup not. len = sum of len_i^2 / sum of len_i over the documents; attention is
 * counted causally, half of the square. Forward alone is a third. */
double rt_student_flops_per_token(const struct rt_student_config *c, const struct rt_params *p, double len);

#endif
