#pragma once

#include "numbers.h"

// Attention of `count` sequences that lie one after the other, sequence q at tokens starts[q] on, lengths[q] of them, at most
// `longest`; all see the `before` tokens of `prefix` first. Matrix products want, of each sequence and head of keys, the queries
// that share it below each other, (count, kv_heads, share x longest, e), and keys and values (count, kv_heads, keys, e).
struct Block {
    const int64_t *starts, *lengths, *prefix;
    int64_t count, longest, before, keys, heads, kv_heads, e;
    int64_t share() const { return heads / kv_heads; }
    int64_t all() const { return heads + 2 * kv_heads; }
    // The token in row r of a sequence's keys; -1 where there is none.
    int64_t token(int64_t q, int64_t r) const {
        return r < before ? prefix[r] : r < before + lengths[q] ? starts[q] + r - before : -1;
    }
};
