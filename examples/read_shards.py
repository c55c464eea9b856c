"""Prints the rows of a shard as JSON lines:  python3 read_shards.py rows-000000.msgpack   (needs: pip install msgpack)"""
import struct
import sys
import zlib

import msgpack


def column(block, name, code):
    width, stride, raw, crc, packed = block["cols"][name]
    if zlib.crc32(packed) != crc:
        sys.exit(f"column {name} is damaged")
    planes, n = zlib.decompress(packed), raw // width
    data = bytearray(raw)
    for byte in range(width):
        data[byte::width] = planes[byte * n:(byte + 1) * n]
    if stride:  # differences within runs of `stride`
        words = list(struct.unpack(f"<{n}I", data))
        for i in range(1, n):
            if i % stride:
                words[i] = (words[i] + words[i - 1]) & 0xFFFFFFFF
        data = struct.pack(f"<{n}I", *words)
    return struct.unpack(f"<{n}{code}", data)


with open(sys.argv[1], "rb") as f:
    for b in msgpack.Unpacker(f, max_buffer_size=0):
        if "identity" in b:
            temperatures = ["%g" % t for t in b["identity"]["temperatures"]]
        if "cols" not in b:  # header and index
            continue
        ids, pos, top, logits, lse, nxt, logprob, rank = (column(b, name, code) for name, code in (
            ("ids", "I"), ("pos", "I"), ("topk_ids", "I"), ("topk_logits", "f"), ("lse", "f"), ("next", "I"), ("next_logprob", "f"), ("next_rank", "I")))
        k, n_lse = len(top) // max(b["rows"], 1), len(temperatures)
        for i in range(b["rows"]):
            m = next((j for j in range(k) if top[i * k + j] == 0xFFFFFFFF), k)  # behind it entries are empty
            lses = ",".join(f'"{t}":{v:.9g}' for t, v in zip(temperatures, lse[i * n_lse:]))
            print(f'{{"seq":{b["seq"]},"pos":{pos[i]},"token":{ids[pos[i] - b["token0"]]},"next":{nxt[i]},"next_logprob":{logprob[i]:.9g},'
                  f'"next_rank":{rank[i]},"ids":[{",".join(map(str, top[i * k:i * k + m]))}],'
                  f'"logits":[{",".join("%.9g" % v for v in logits[i * k:i * k + m])}],"lse":{{{lses}}}}}')
