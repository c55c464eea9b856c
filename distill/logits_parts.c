/* Parts of one input: what each says in its logits-I-of-N.json about the data that it was cut from. */
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "distill/logits.h"

void rt_logits_plan_name(int part, int n_parts, char out[64])
{
    if (n_parts > 1)
        snprintf(out, 64, "logits-%d-of-%d.json", part, n_parts);
    else
        snprintf(out, 64, "logits.json");
}

enum rt_status rt_logits_parts_agree(const char *dir, int n_parts, const char *sha256, struct rt_err *err)
{
    struct rt_json *plan = NULL;
    char name[64], path[4096], first[65] = "", first_name[64] = "this part";
    const char *data;
    enum rt_status st = RT_OK;
    if (sha256 != NULL)
        snprintf(first, sizeof first, "%s", sha256);
    for (int i = 0; i < n_parts && n_parts > 1; i++) {
        rt_logits_plan_name(i, n_parts, name);
        RT_TRY(rt_path_join(path, sizeof path, dir, name, err));
        if (!rt_path_exists(path))
            continue;
        RT_TRY(rt_json_load(path, 1 << 20, &plan, err));
        RT_TRY(rt_json_string_or(rt_json_get(plan, "config"), "input_sha256", "", &data, err));
        if (first[0] == '\0') {
            snprintf(first, sizeof first, "%s", data);
            memcpy(first_name, name, sizeof name);
        }
        if (data[0] != '\0' && strcmp(first, data) != 0)
            RT_FAIL(err, REFUSED, "%s: made of other data than %s (sha256 %.12s, not %.12s): together they would repeat sequences and lack others; "
                    "score all parts of the same input, with the same --max-length and --overlong", path, first_name, data, first);
        rt_json_free(plan);
        plan = NULL;
    }
out:
    rt_json_free(plan);
    return st;
}
