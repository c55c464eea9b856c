/* Prints the rows of a shard as JSON lines:  cc read_shards.c -lmsgpackc -lz -o read_shards && ./read_shards rows-000000.msgpack */
#include <msgpack.h>
#include <stdio.h>
#include <string.h>
#include <zlib.h>

static msgpack_object *get(msgpack_object *map, const char *key) {
    for (uint32_t i = 0; map->type == MSGPACK_OBJECT_MAP && i < map->via.map.size; i++)
        if (map->via.map.ptr[i].key.via.str.size == strlen(key) && !memcmp(map->via.map.ptr[i].key.via.str.ptr, key, strlen(key)))
            return &map->via.map.ptr[i].val;
    return NULL;
}
static void *column(msgpack_object *block, const char *name) { /* [width, stride, raw bytes, crc32, compressed bytes] */
    msgpack_object *a = get(get(block, "cols"), name)->via.array.ptr;
    uLongf w = a[0].via.u64, stride = a[1].via.u64, raw = a[2].via.u64, n = raw / w;
    uint8_t *planes = malloc(raw + 1), *out = malloc(raw + 4);
    if (crc32(0, (Bytef *)a[4].via.bin.ptr, a[4].via.bin.size) != a[3].via.u64 || uncompress(planes, &raw, (Bytef *)a[4].via.bin.ptr, a[4].via.bin.size))
        fprintf(stderr, "column %s is damaged\n", name), exit(3);
    for (uLongf i = 0; i < raw; i++) out[i % n * w + i / n] = planes[i];
    for (uLongf i = 1; stride && i < n; i++) if (i % stride) ((uint32_t *)out)[i] += ((uint32_t *)out)[i - 1];
    return free(planes), out; /* the process ends soon: columns are not freed */
}
int main(int argc, char **argv) {
    FILE *f = argc == 2 ? fopen(argv[1], "rb") : NULL; msgpack_unpacker u; msgpack_unpacked o; msgpack_object *T = NULL; size_t got;
    for (msgpack_unpacker_init(&u, 1 << 20); f && msgpack_unpacker_reserve_buffer(&u, 1 << 20) && (got = fread(msgpack_unpacker_buffer(&u), 1, 1 << 20, f)) > 0;)
        msgpack_unpacker_buffer_consumed(&u, got);
    for (msgpack_unpacked_init(&o); msgpack_unpacker_next(&u, &o) == MSGPACK_UNPACK_SUCCESS; o.zone = NULL) {
        msgpack_object *b = &o.data, *id = get(b, "identity"); if (id) T = get(id, "temperatures");
        if (!get(b, "cols")) continue; /* header and index */
        uint64_t n = get(b, "rows")->via.u64, t0 = get(b, "token0")->via.u64, L = T->via.array.size, k = n ? get(get(b, "cols"), "topk_ids")->via.array.ptr[2].via.u64 / n / 4 : 0;
        uint32_t *ids = column(b, "ids"), *pos = column(b, "pos"), *top = column(b, "topk_ids"), *next = column(b, "next"), *rank = column(b, "next_rank");
        float *logits = column(b, "topk_logits"), *lse = column(b, "lse"), *lp = column(b, "next_logprob");
        for (uint64_t i = 0, j, m; i < n; i++, puts("}}")) { for (m = 0; m < k && top[i * k + m] != UINT32_MAX; m++) {} /* behind it entries are empty */
            printf("{\"seq\":%lu,\"pos\":%u,\"token\":%u,\"next\":%u,\"next_logprob\":%.9g,\"next_rank\":%u,\"ids\":[", (unsigned long)get(b, "seq")->via.u64, pos[i], ids[pos[i] - t0], next[i], lp[i], rank[i]);
            for (j = 0; j < m; j++) printf("%s%u", j ? "," : "", top[i * k + j]);
            for (j = 0; j < m; j++) printf("%s%.9g", j ? "," : "],\"logits\":[", logits[i * k + j]);
            for (j = 0; j < L; j++) printf("%s\"%g\":%.9g", j ? "," : m ? "],\"lse\":{" : "],\"logits\":[],\"lse\":{", T->via.array.ptr[j].via.f64, lse[i * L + j]);
        }
    }
}
