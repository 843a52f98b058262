#pragma once

#include "numbers.h"

// Sequences whose attention is computed together. Sequence q has lengths[q] tokens, at most `longest`,
// starting at token starts[q]. All sequences also attend to the same `prefix_length` earlier tokens, listed
// in `prefix`.
//
// The matrix products of the backward pass use padded copies:
//   queries (count, kv_heads, share x longest, head_dim), with the queries that share a key head stacked,
//   keys and values (count, kv_heads, padded_keys, head_dim).
struct Block {
    const int64_t *starts, *lengths, *prefix;
    int64_t count, longest, prefix_length, padded_keys, heads, kv_heads, head_dim;
    int64_t share() const { return heads / kv_heads; }
    int64_t all_heads() const { return heads + 2 * kv_heads; }
    // The token in row r of the padded keys of sequence q, or -1 for padding.
    int64_t token(int64_t q, int64_t r) const {
        return r < prefix_length                ? prefix[r]
               : r < prefix_length + lengths[q] ? starts[q] + r - prefix_length
                                                : -1;
    }
};
