/* Two tokenizers on one text: the counts that `doctor` and the bench show. */
#include <string.h>

#include "distill/overlap.h"
#include "tests/suite.h"

static struct rt_tokenizer *load(const char *dir)
{
    struct rt_err err = {0};
    struct rt_tokenizer *t = NULL;
    assert_ok(rt_tokenizer_load(dir, &t, &err));
    return t;
}

static void add(struct rt_overlap *o, const char *text)
{
    struct rt_err err = {0};
    assert_ok(rt_overlap_add(o, text, strlen(text), &err));
}

static void a_text_cut_twice(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_tokenizer *t = load("examples/tiny_teacher"), *s = load("examples/crossing_student");
    struct rt_overlap o;
    uint32_t top[RT_OVERLAP_TOP], tally;
    assert_ok(rt_overlap_open(&o, t, s, &err));
    /* teacher: " \", "boxed", "{fuse", "}"; student: " \", "boxed", "{", "f", "use", "}" */
    add(&o, " \\boxed{fuse}");
    assert_int_equal(o.c.teacher, 4);
    assert_int_equal(o.c.student, 6);
    assert_int_equal(o.c.kind[RT_PLACE_WHOLE], 3);
    assert_int_equal(o.c.kind[RT_PLACE_HEAD], 1);
    assert_int_equal(o.c.kind[RT_PLACE_INSIDE], 2);
    assert_int_equal(o.c.boundary, 4);
    assert_int_equal(rt_overlap_exact(&o.c), 6);
    assert_int_equal(o.c.longest, 3);
    assert_int_equal(o.c.bytes, 13);
    assert_int_equal(rt_overlap_top(&o, top), 0);
    /* the teacher spells "Tally", the student has it; " 37": a blank and two digits on both sides */
    add(&o, "Tally 37");
    assert_true(rt_tokenizer_find(s, "Tally", 5, &tally));
    assert_int_equal(o.c.kind[RT_PLACE_CROSSING], 1);
    assert_int_equal(rt_overlap_top(&o, top), 1);
    assert_int_equal(top[0], tally);
    assert_int_equal(o.c.digits, 2);
    assert_int_equal(o.c.digits_whole, 2);
    assert_int_equal(o.c.blank, 1);
    assert_int_equal(o.c.texts, 2);
    /* what `retarget` leaves out */
    add(&o, "");
    add(&o, "\xff");
    add(&o, "e\xcc\x81"); /* NFD: the student's tokenizer would make other bytes of it */
    assert_int_equal(o.c.texts, 2);
    assert_int_equal(o.c.left_out, 3);
    rt_overlap_clear(&o);
    assert_int_equal(o.c.student, 0);
    assert_int_equal(rt_overlap_top(&o, top), 0);
    rt_overlap_close(&o);
    rt_tokenizer_free(t);
    rt_tokenizer_free(s);
}

static void one_tokenizer_overlaps_itself(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_tokenizer *t = load("examples/crossing_student"), *s = load("examples/crossing_student");
    struct rt_overlap o;
    assert_ok(rt_overlap_open(&o, t, s, &err));
    add(&o, "Tally: hum 3, \xf0\x9f\x9a\xa8 \xe6\xbc\xa2.\r\n</think>\n\nAnswer: \\boxed{fuse}");
    assert_int_equal(o.c.kind[RT_PLACE_WHOLE], o.c.student);
    assert_int_equal(o.c.boundary, o.c.student);
    assert_int_equal(o.c.longest, 1);
    rt_overlap_close(&o);
    rt_tokenizer_free(t);
    rt_tokenizer_free(s);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_text_cut_twice),
    cmocka_unit_test(one_tokenizer_overlaps_itself),
};
RT_SUITE(overlap, tests)
