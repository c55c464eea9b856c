/* Inside the chat templates: what a template is made of, shared by recognition and rendering. */
#ifndef RT_FORMATS_TEMPLATE_INTERNAL_H
#define RT_FORMATS_TEMPLATE_INTERNAL_H

#include "formats/template.h"

enum rt_family { RT_DEEPSEEK_V3, RT_DEEPSEEK_R1, RT_DEEPSEEK_V3_1, RT_CHATML, RT_QWEN3, RT_LLAMA3, RT_PLAIN };

struct rt_template {
    enum rt_family family;
    char sha256[65];
    struct rt_tokenizer *tok;
    bool bos;               /* the text begins with BOS */
    bool join_systems;      /* DeepSeek: all system messages, joined by a blank line; else the last one */
    bool trim;              /* Llama: contents lose white space at both ends */
    char forced[16];        /* "<think>\n" where the generation prompt ends with it */
    struct rt_buf system;   /* ChatML: default system prompt; Llama: date lines; data NULL: none. Terminated */
    struct rt_buf bos_text, end_text;
    uint32_t end_id;
};

/* Where the targets of one assistant turn lie in the rendered text. */
struct rt_span {
    size_t cut;   /* right behind a special token, at or before begin: ids of the text may be cut here */
    size_t begin; /* first byte of a target */
    size_t end;   /* behind the end token */
};
struct rt_spans {
    struct rt_span *at; /* [n], room for one a message */
    size_t n;
};

/* Appends the text of the messages. keep_last: the last message is the assistant's turn to train on. spans->at has room for n. */
enum rt_status rt_template_text(const struct rt_template *t, const struct rt_message *m, size_t n, bool keep_last,
                                const char *where, struct rt_buf *text, struct rt_spans *spans, struct rt_err *err);
/* Appends the opening of an assistant turn after these messages, up to and without what is forced. */
enum rt_status rt_template_opening(const struct rt_template *t, const struct rt_message *m, size_t n, struct rt_buf *text,
                                   struct rt_err *err);

#endif
