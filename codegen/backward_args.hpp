// What a call hands to a backward kernel: sizes, tensors, the plan's numbers, places in its workspace; all 8 bytes wide.
#pragma once
#include <atomic>

#include "args.hpp"

namespace moec {

// A gradient laid out like its parameter, contiguous; null where it is not wanted, as a whole or for one expert.
struct Gradient {
  char* base;
  int64_t stride;  // bytes
  void* const* table;

  template <class W>
  MOEC_INLINE W* of(int64_t e) const {
    if (table) return static_cast<W*>(table[e]);
    return base ? reinterpret_cast<W*>(base + e * stride) : nullptr;
  }
  template <class W>
  void zero(int64_t e, int64_t n) const {
    if (W* const p = of<W>(e)) std::memset(static_cast<void*>(p), 0, size_t(n) * sizeof(W));
  }
  MOEC_INLINE bool any() const { return base || table; }
};

// Expert `e` with rows [row, row + rows) of the sorted pairs; its tasks in the second phase end before number `end`.
struct Hit {
  int64_t e, row, rows, end;
};

// Hits and segments [begin, end) and rows of experts that are taken together; `next` counts tasks taken, by phase.
struct Group {
  int64_t hits[2], segments[2], row, rows;
  std::atomic<int64_t> next[2];
};

struct BackwardArgs {
  // From the plan.
  int64_t threads, T, H, F, O, E, k;
  int64_t group;               // pairs at a time, unless one expert has more: bounds the workspace
  int64_t few[3], k_many[3];   // as in Args, for the products x·W_in, g·W_out and slopes·W_in
  int64_t k_few, row_block;
  int64_t cols, x_cols;        // columns of one task of the first two products, of the third
  int64_t outer_m, outer_n, outer_k;
  int64_t x_direct, g_direct;  // x and the gradient of y are read in place
  int64_t ld_x, ld_g, ld_h, ld_s;  // elements from row to row of the workspace's rows of H, of O, of F, of slopes
  int64_t at_x, at_g, at_sum, at_weights, at_partial, at_position, at_pair, at_begin, at_hits, at_segments, at_groups,
      at_x_rows, at_g_rows, at_h_rows, at_s_rows, at_h, at_s, at_out, at_thread;  // places in the workspace, in bytes
  int64_t per_thread, at_tile, at_b, at_c, at_rows;  // a thread's share of it, and places therein
  // From the call.
  char* work;
  Matrix x, g;             // [T, H] and [T, O]
  const int64_t* experts;  // [T, k]
  const void* weights;     // [T, k]
  int64_t weights_dtype;
  Experts a, b, out, bias_a, bias_b, bias_out;
  const char* saved;  // [T·k, a then b] in the parameters' dtype, as the forward left them; null: computed again
  void* dx;           // [T, H] in x's dtype; null: not wanted
  void* dweights;     // [T, k] in the weights' dtype; null: not wanted
  Gradient da, db, dout, dbias_a, dbias_b, dbias_out;  // a's: of the whole tensor where a and b share one

  template <class T>
  MOEC_INLINE T* at(int64_t offset) const { return reinterpret_cast<T*>(work + offset); }
};

}  // namespace moec
