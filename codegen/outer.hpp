// C[M, N] = Σ_r A[r][m] · B[r][n] over a ragged number of rows: the products that gradients of weights are made of.
//
// A and B are tables of pointers to rows of floats. Blocks of A are transposed and panels of B packed into cache, where
// the packed micro-kernel of gemm.hpp runs; sums are fp32, and are C itself where C holds floats.
#pragma once
#include <algorithm>

#include "gemm.hpp"

namespace moec {

// Room for one task of outer(): blocks of at most `m` columns of A, `n` of B and `k` rows.
struct OuterRoom {
  int64_t m, n, k;
  const float** rows;  // [m]
  float* a;            // [m][k + L]
  float* b;            // [k + 1][OUTER_PANELS * NR]
  float* c;            // [m][n], for gradients that are not floats

  MOEC_INLINE int64_t ld_a() const { return k + L; }
};

constexpr int64_t OUTER_PANELS = 4;  // packed at a time: 256 bytes of each row, as memory likes it

// Columns [j, j + n) of k rows into [n][ld].
__attribute__((noinline)) inline void transpose_columns(const float* const* rows, int64_t j, int64_t n, int64_t k,
                                                        float* to, int64_t ld) {
  for (int64_t r = 0; r < k; r += L) {
    for (int64_t c = 0; c < n; c += L) {
      const int64_t part = n - c < L ? n - c : L;
      vf v[L];
      if (part == L && r + L <= k) {
        const void* from[L];
        for (int i = 0; i < L; i++) from[i] = rows[r + i] + j + c;
        load_transposed(from, v);
      } else {
        for (int i = 0; i < L; i++) v[i] = r + i < k ? some(rows[r + i] + j + c, part) : vf{};
        transpose(v);
      }
      float* const out = to + c * ld + r;
      if (part == L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) store(out + i * ld, v[i]);
      } else {
        for (int i = 0; i < part; i++) store(out + i * ld, v[i]);
      }
    }
  }
}

// Columns [j, j + n) of k rows into panels of [k][NR], pitch(k) apart. Columns past n are zero.
__attribute__((noinline)) inline void pack_columns(const float* const* rows, int64_t j, int64_t n, int64_t k, vf* to) {
  for (int64_t r = 0; r < k; r++) {
    const float* const row = rows[r] + j;
    vf* out = to + r * NV;
    for (int64_t p = 0; p < n; p += NR, out += pitch(k)) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        const int64_t at = p + v * L;
        out[v] = at + L <= n ? load(row + at) : at < n ? load_n(row + at, n - at) : vf{};
      }
    }
  }
}

// Columns [m0, m0 + m) of A and [n0, n0 + n) of B, both within the room, into to[m][n], `ld` elements from row to row.
template <class Op>
void outer(const OuterRoom& room, const float* const* a, int64_t m0, int64_t m, const float* const* b, int64_t n0,
           int64_t n, int64_t rows, typename Op::W* to, int64_t ld) {
  using W = typename Op::W;
  constexpr bool direct = sizeof(W) == 4;
  float* c = room.c;
  if constexpr (direct) c = to;
  const int64_t ldc = direct ? ld : room.n, blocks = (rows + room.k - 1) / room.k;
  for (int64_t i = 0; i < m; i++) room.rows[i] = room.a + i * room.ld_a();
  vf* const packed = reinterpret_cast<vf*>(room.b);
  for (int64_t q = 0; q < blocks; q++) {
    const int64_t r = rows * q / blocks, k = rows * (q + 1) / blocks - r;
    transpose_columns(a + r, m0, m, k, room.a, room.ld_a());
    for (int64_t j0 = 0; j0 < n; j0 += OUTER_PANELS * NR) {
      const int64_t width = std::min(n - j0, OUTER_PANELS * NR);
      pack_columns(b + r, n0 + j0, width, k, packed);
      for (int64_t j = 0; j < width; j += NR) {
        const vf* const panel = packed + j / NR * pitch(k);
        for (int64_t i = 0; i < m; i += MR)
          micro_rows<Op>(std::min<int64_t>(MR, m - i), room.rows + i, 0, panel, k, c + i * ldc + j0 + j, ldc,
                         std::min<int64_t>(NR, width - j), q > 0, NothingAhead{});
      }
    }
  }
  if constexpr (!direct)
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j += L) store_some(to + i * ld + j, load(c + i * ldc + j), std::min<int64_t>(L, n - j));
}

// to[n] = Σ_r rows[r][j..j + n), each times weight[pairs[r]] where there are pairs.
template <class W>
void sum_rows(W* to, const float* const* rows, int64_t count, int64_t j, int64_t n, const int64_t* pairs,
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

template <class V>
float dot(const float* u, const V* v, int64_t n) {
  vf sum{};
  for (int64_t j = 0; j < n; j += L) {
    const int64_t part = std::min<int64_t>(L, n - j);
    sum += some(u + j, part) * some(v + j, part);
  }
  return total(sum);
}

}  // namespace moec
