// What a call hands to a kernel: sizes, tensors, the plan's numbers and the places in its workspace; all 8 bytes wide.
#pragma once
#include "vec.hpp"

namespace moec {

// A tensor [E, rows, columns] with unit inner stride: expert e begins at `base` + e * `stride`, or at table[e].
struct Experts {
  const char* base;
  int64_t stride;  // bytes
  const void* const* table;
  int64_t offset;  // bytes, from where an expert begins
  int64_t ld;      // elements from row to row

  template <class W>
  MOEC_INLINE const W* of(int64_t e) const {
    const char* begin = table ? static_cast<const char*>(table[e]) : base + e * stride;
    return reinterpret_cast<const W*>(begin + offset);
  }
};

// A matrix of any element type and strides (in elements).
struct Matrix {
  const char* base;
  int64_t dtype, row, column;
};

struct Vector {
  const void* base;  // null: absent
  int64_t dtype;
};

struct Args {
  // From the plan.
  int64_t threads, T, H, F, O, E, k;
  int64_t chunk;                     // tokens at a time, which bounds the workspace
  int64_t few[2];                    // up to this many rows an expert the weights are streamed, above it packed
  int64_t few_cols[2], many_cols[2]; // columns of one task; the first phase projects in, the second out
  int64_t row_block;                 // rows of one task
  int64_t k_few, k_many[2];          // K is cut into blocks of these sizes
  int64_t x_direct, router_direct;   // x is read in place by the experts, by the router
  int64_t ld_x, ld_h;                // elements from row to row of the workspace's copies
  int64_t at_router_x, at_x, at_logits, at_weights, at_position, at_pair, at_begin, at_segments, at_x_rows, at_h_rows,
      at_router_rows, at_h, at_out, at_thread;  // places in the workspace, in bytes
  int64_t per_thread, at_tile;                  // a thread's share of it, and its tile of C therein
  // From the call.
  char* work;
  Matrix x;
  void* y;           // [T, O]
  int64_t* experts;  // [T, k], out of `moe`, in of `experts`
  void* weights;     // [T, k], likewise
  int64_t weights_dtype;
  Experts a, b, out, bias_a, bias_b, bias_out;
  char* saved;       // [T·k, a then b] in the parameters' dtype: projections of each pair for backward; null: not kept
  void* logits;      // [T, E] out, in the router's compute dtype; the rest is for `moe` only
  Matrix router;
  Vector router_bias, selection_bias;
  int64_t* waits;  // [threads] to which the nanoseconds that each thread waits for others are added; null: not measured
  Experts scale_a, scale_b, scale_out;  // of matrices that are kept as codes, in fp32
  int64_t nodes, cpus;                  // memory nodes, 1 or more; processors in the table
  const int32_t* node_of_cpu;           // null where there is one node
  const int32_t* node_of_expert;

  template <class T>
  MOEC_INLINE T* at(int64_t offset) const { return reinterpret_cast<T*>(work + offset); }
};

MOEC_INLINE float read(const void* base, int64_t dtype, int64_t i) {
  if (dtype == F32) return static_cast<const float*>(base)[i];
  if (dtype == BF16) return value(static_cast<const bf16*>(base)[i]);
  return value(static_cast<const f16*>(base)[i]);
}

MOEC_INLINE void write(void* base, int64_t dtype, int64_t i, float x) {
  if (dtype == F32) static_cast<float*>(base)[i] = x;
  else if (dtype == BF16) static_cast<bf16*>(base)[i] = narrow<bf16>(x);
  else static_cast<f16*>(base)[i] = narrow<f16>(x);
}

// `n` numbers of row `r` of a matrix, rounded to R, as floats or bf16; `scale` multiplies before that.
template <class R, class In, class Out>
MOEC_INLINE void copy_row(const In* from, int64_t column, int64_t n, float scale, Out* to) {
  int64_t i = 0;
  if (column == 1 && scale == 1.0f && sizeof(R) >= sizeof(In)) {
    for (; i + L <= n; i += L) store(to + i, load(from + i));
  }
  for (; i < n; i++) to[i] = narrow<Out>(rounded<R>(value(from[i * column]) * scale));
}

template <class R, class Out>
inline void copy_row(const Matrix& x, int64_t r, int64_t n, float scale, Out* to) {
  const int64_t at = r * x.row;
  if (x.dtype == F32) copy_row<R>(reinterpret_cast<const float*>(x.base) + at, x.column, n, scale, to);
  else if (x.dtype == BF16) copy_row<R>(reinterpret_cast<const bf16*>(x.base) + at, x.column, n, scale, to);
  else copy_row<R>(reinterpret_cast<const f16*>(x.base) + at, x.column, n, scale, to);
  if (sizeof(Out) == 2 && n % 2) to[n] = {};  // pairs of bf16 read one more
}

}  // namespace moec
