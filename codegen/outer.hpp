// C[M, N] = Σ_r A[r][m] · B[r][n] over a ragged number of rows: the products that gradients of weights are made of.
//
// A and B are tables of pointers to rows of floats, or of bf16 that is multiplied in pairs, which two rows below one
// another make. Blocks of A are transposed and panels of B packed into cache, where the packed micro-kernel of gemm.hpp
// runs; sums are fp32, and are C itself where C holds floats.
#pragma once
#include <algorithm>

#include "gemm.hpp"

namespace moec {

// Room for one task of outer(): blocks of at most `m` columns of A, `n` of B and `k` rows.
template <class Op>
struct OuterRoom {
  using A = typename Op::A;
  int64_t m, n, k;
  const A** rows;           // [m]
  A* a;                     // [m][k + a vector's]
  typename Op::Word* b;     // [words of k + 1][OUTER_PANELS * NR]
  float* c;                 // [m][n], for gradients that are not floats

  MOEC_INLINE int64_t ld_a() const { return (k + 1) / 2 * 2 + L * Op::per; }
};

constexpr int64_t OUTER_PANELS = 4;  // packed at a time: a line or four of each row, as memory likes it

// Numbers [j, j + n) of row r of k as words: numbers, or pairs with those of the row below, which is zero behind the last.
template <class Op>
MOEC_INLINE typename Op::Word row_words(const typename Op::A* const* rows, int64_t r, int64_t k, int64_t j, int64_t n) {
  using A = typename Op::A;
  if (r >= k) return typename Op::Word{};
  const A* const row = rows[r] + j;
  if constexpr (Op::per == 1) return some(row, n);
  else {
    const A* const below = r + 1 < k ? rows[r + 1] + j : nullptr;
    return n == L ? Op::column(row, below) : Op::column_n(row, below, n);
  }
}

// Columns [j, j + n) of k rows into [n][ld].
template <class Op>
__attribute__((noinline)) void transpose_columns(const typename Op::A* const* rows, int64_t j, int64_t n, int64_t k,
                                                 typename Op::A* to, int64_t ld) {
  constexpr int64_t step = L * Op::per;
  for (int64_t r = 0; r < k; r += step) {
    for (int64_t c = 0; c < n; c += L) {
      const int64_t part = n - c < L ? n - c : L;
      vf v[L];
      if (Op::per == 1 && part == L && r + L <= k) {
        const void* from[L];
        for (int i = 0; i < L; i++) from[i] = rows[r + i] + j + c;
        load_transposed(from, v);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) v[i] = (vf)row_words<Op>(rows, r + i * Op::per, k, j + c, part);
        transpose(v);
      }
      float* const out = reinterpret_cast<float*>(to + c * ld + r);
      const int64_t words = ld / Op::per;
      if (part == L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) store(out + i * words, v[i]);
      } else {
        for (int i = 0; i < part; i++) store(out + i * words, v[i]);
      }
    }
  }
}

// Columns [j, j + n) of k rows into panels of [words of k][NR], pitch(words) apart. Columns past n are zero.
template <class Op>
__attribute__((noinline)) void pack_columns(const typename Op::A* const* rows, int64_t j, int64_t n, int64_t k,
                                            typename Op::Word* to) {
  const int64_t words = (k + Op::per - 1) / Op::per;
  for (int64_t i = 0; i < words; i++) {
    typename Op::Word* out = to + i * NV;
    for (int64_t p = 0; p < n; p += NR, out += pitch(words)) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        const int64_t at = p + v * L, part = std::min<int64_t>(L, n - at);
        out[v] = part > 0 ? row_words<Op>(rows, i * Op::per, k, j + at, part) : typename Op::Word{};
      }
    }
  }
}

// Columns [m0, m0 + m) of A and [n0, n0 + n) of B, both within the room, into to[m][n], `ld` elements from row to row.
template <class Op>
void outer(const OuterRoom<Op>& room, const typename Op::A* const* a, int64_t m0, int64_t m,
           const typename Op::A* const* b, int64_t n0, int64_t n, int64_t rows, typename Op::W* to, int64_t ld) {
  using W = typename Op::W;
  constexpr bool direct = sizeof(W) == 4;
  float* c = room.c;
  if constexpr (direct) c = to;
  const int64_t ldc = direct ? ld : room.n, blocks = (rows + room.k - 1) / room.k;
  for (int64_t i = 0; i < m; i++) room.rows[i] = room.a + i * room.ld_a();
  for (int64_t q = 0; q < blocks; q++) {
    const int64_t r = rows * q / blocks, k = rows * (q + 1) / blocks - r, words = (k + Op::per - 1) / Op::per;
    transpose_columns<Op>(a + r, m0, m, k, room.a, room.ld_a());
    const Left<Op> left(room.rows, m, 0, k, nullptr, room.m);
    for (int64_t j0 = 0; j0 < n; j0 += OUTER_PANELS * NR) {
      const int64_t width = std::min(n - j0, OUTER_PANELS * NR);
      pack_columns<Op>(b + r, n0 + j0, width, k, room.b);
      for (int64_t j = 0; j < width; j += NR) {
        const auto* const panel = room.b + j / NR * pitch(words);
        for (int64_t i = 0; i < left.blocks(); i++)
          left.multiply(i, panel, words, c + j0 + j, ldc, std::min<int64_t>(NR, width - j), q > 0, NothingAhead{});
      }
    }
  }
  if constexpr (!direct)
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j += L) store_some(to + i * ld + j, load(c + i * ldc + j), std::min<int64_t>(L, n - j));
}

// to[n] = Σ_r rows[r][j..j + n), each times weight[pairs[r]] where there are pairs.
template <class W, class A>
void sum_rows(W* to, const A* const* rows, int64_t count, int64_t j, int64_t n, const int64_t* pairs,
              const float* weight) {
  if (!to) return;
  for (int64_t c = 0; c < n; c += L) {
    const int64_t part = std::min<int64_t>(L, n - c);
    vf sum{};
    for (int64_t r = 0; r < count; r++) {
      const vf v = some(rows[r] + j + c, part);
      sum += pairs ? weight[pairs[r]] * v : v;
    }
    store_some(to + c, sum, part);
  }
}

MOEC_INLINE float total(vf v) { return sums(v, vf{}, vf{}, vf{})[0]; }
MOEC_COLD inline vf only(vf v, int64_t n) {  // the others may be anything, NaN say, and become zero
  float first[L] = {};
  store_n(first, v, n);
  return load(first);
}

template <class U, class V>
float dot(const U* u, const V* v, int64_t n) {
  vf sum{};
  for (int64_t j = 0; j < n; j += L) {
    const int64_t part = std::min<int64_t>(L, n - j);
    sum += some(u + j, part) * some(v + j, part);
  }
  return total(sum);
}

}  // namespace moec
