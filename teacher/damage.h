/* Which tensor made the hidden states of a layer non-finite: reads the tensors of some parts again, as they lie on disk. */
#ifndef RT_TEACHER_DAMAGE_H
#define RT_TEACHER_DAMAGE_H

#include "formats/safetensors.h"
#include "teacher/config.h"
#include "teacher/weights.h"

enum { RT_DAMAGE_TEXT = 400 };

/* Looks through weights and scales of parts [n] for values that are no number: NaN codes of E4M3, NaN and infinity elsewhere. text says
 * which is the first such tensor (name, element, file and offset) and how many more there are, or that there is none: then the states
 * overflowed, and it names the tensor of the greatest value; or why it could not look. */
void rt_damage_find(const struct rt_tensors *ts, const struct rt_teacher_config *c, const struct rt_part_id *parts, int64_t n,
                    char text[RT_DAMAGE_TEXT]);
/* The same for one tensor by name. */
void rt_damage_find_in(const struct rt_tensors *ts, const char *name, char text[RT_DAMAGE_TEXT]);

#endif
