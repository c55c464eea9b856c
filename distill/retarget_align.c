#include "distill/retarget_align.h"

static bool target(const struct rt_side *s, int64_t i)
{
    return s->target == NULL || s->target[i] != 0;
}

void rt_align(const struct rt_side *t, const struct rt_side *s, struct rt_place *place)
{
    int64_t j = t->first;
    uint32_t a = s->begin, begin = t->begin; /* of student token i, of teacher token j */
    for (int64_t i = 0; i < s->n; i++)
        place[i] = (struct rt_place){.kind = RT_PLACE_NONE, .teacher = -1, .last = -1};
    for (int64_t i = s->first; i < s->n; a = s->end[i++]) {
        const uint32_t b = s->end[i];
        struct rt_place *p = &place[i];
        for (; j < t->n && t->end[j] <= a; j++)
            begin = t->end[j];
        if (j == t->n || a < begin || b <= a || !target(s, i))
            continue;
        int64_t l = j;
        bool good = target(t, j);
        while (l < t->n && t->end[l] < b)
            good &= ++l < t->n && target(t, l);
        if (!good)
            continue;
        p->teacher = j;
        p->last = l;
        p->offset = a - begin;
        p->ends = t->end[l] == b;
        if (l > j)
            p->kind = RT_PLACE_CROSSING;
        else if (p->offset > 0)
            p->kind = RT_PLACE_INSIDE;
        else
            p->kind = p->ends ? RT_PLACE_WHOLE : RT_PLACE_HEAD;
    }
}
