// Products of few rows: W is streamed as it is stored, each number of it read from memory once.
//
// A is a table of row pointers. W is nk (row n holds K numbers) or kn (row k holds the columns), `ld` elements apart.
// An Op says how a word of A meets a word of W: one number a lane (Fma), or a pair of bf16 (DotPairs).
#pragma once
#include "vec.hpp"

namespace moec {

constexpr int DM = MOEC_DOT_ROWS;  // rows of A in the dot kernel, which takes 4 rows of W

enum class Layout { nk, kn, panels };

template <class Weight>
struct Fma {
  using A = float;
  using W = Weight;
  using Word = vf;
  static constexpr int per = 1;
  static MOEC_INLINE Word a(const A* p) { return load(p); }
  static MOEC_INLINE Word a_n(const A* p, int64_t n) { return load_n(p, n); }
  static MOEC_INLINE Word w(const W* p) { return load(p); }
  static MOEC_INLINE Word w_n(const W* p, int64_t n) { return load_n(p, n); }
  static MOEC_INLINE vf mac(vf acc, Word x, Word y) { return acc + x * y; }
  static MOEC_INLINE vf mac_one(vf acc, const A* p, Word y) { return acc + *p * y; }
  static MOEC_INLINE Word column(const W* row, const W*) { return load(row); }
  static MOEC_INLINE Word column_n(const W* row, const W*, int64_t n) { return load_n(row, n); }
};

struct DotPairs {
  using A = bf16;
  using W = bf16;
  using Word = vu;
  static constexpr int per = 2;
  static MOEC_INLINE Word a(const A* p) { return raw<vu>(p); }
  static MOEC_COLD Word a_n(const A* p, int64_t n) {
    A part[2 * L] = {};
    std::memcpy(part, p, size_t(n) * sizeof(A));
    return raw<vu>(part);
  }
  static MOEC_INLINE Word w(const W* p) { return a(p); }
  static MOEC_INLINE Word w_n(const W* p, int64_t n) { return a_n(p, n); }
  static MOEC_INLINE vf mac(vf acc, Word x, Word y) { return dot_pairs(acc, x, y); }
  static MOEC_INLINE vf mac_one(vf acc, const A* p, Word y) {
    uint32_t pair;
    std::memcpy(&pair, p, 4);
    return dot_pairs(acc, vu{} + pair, y);
  }
  // Two rows of a kn matrix make the pairs; there is no second row below the last.
  static MOEC_INLINE Word column(const W* row, const W* below) {
    const vu lo = widen(raw<vh>(row));
    return below ? lo | widen(raw<vh>(below)) << 16 : lo;
  }
  static MOEC_COLD Word column_n(const W* row, const W* below, int64_t n) {
    W part[2][L] = {};
    std::memcpy(part[0], row, size_t(n) * sizeof(W));
    if (below) std::memcpy(part[1], below, size_t(n) * sizeof(W));
    return column(part[0], part[1]);
  }
};

// --- few rows, nk: 4 rows of W times M rows of A, vectors along K -----------------------------------------------
// `next` are rows of weights that will be needed soon: PF of them are fetched into cache at the pace of the arithmetic.
template <class Op, int M, int PF, class Next>
__attribute__((noinline)) void dot(const typename Op::A* const* a, int64_t k0, const typename Op::W* w, int64_t ld,
                                   int n, const Next* next, int64_t next_ld, int64_t k, float* c, int64_t ldc,
                                   bool add) {
  using W = typename Op::W;
  constexpr int step = L * Op::per, unroll = 64 / (step * int(sizeof(W))) > 0 ? 64 / (step * int(sizeof(W))) : 1;
  const W* const w0 = w;
  const W* const w1 = w + (n > 1 ? 1 : 0) * ld;
  const W* const w2 = w + (n > 2 ? 2 : n - 1) * ld;
  const W* const w3 = w + (n > 3 ? 3 : n - 1) * ld;
  const typename Op::A* x[M];
  for (int m = 0; m < M; m++) x[m] = a[m] + k0;
  vf acc[M][4] = {};
  auto body = [&](int64_t i) MOEC_INLINE_LAMBDA {
    const auto v0 = Op::w(w0 + i), v1 = Op::w(w1 + i), v2 = Op::w(w2 + i), v3 = Op::w(w3 + i);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const auto v = Op::a(x[m] + i);
      acc[m][0] = Op::mac(acc[m][0], v, v0);
      acc[m][1] = Op::mac(acc[m][1], v, v1);
      acc[m][2] = Op::mac(acc[m][2], v, v2);
      acc[m][3] = Op::mac(acc[m][3], v, v3);
    }
  };
  int64_t i = 0;
  for (; i + unroll * step <= k; i += unroll * step) {
#pragma GCC unroll 4
    for (int p = 0; p < PF; p++) prefetch(next + p * next_ld + i);
#pragma GCC unroll 4
    for (int u = 0; u < unroll; u++) body(i + u * step);
  }
  for (; i + step <= k; i += step) body(i);
  if (i < k) {
    const auto v0 = Op::w_n(w0 + i, k - i), v1 = Op::w_n(w1 + i, k - i), v2 = Op::w_n(w2 + i, k - i),
               v3 = Op::w_n(w3 + i, k - i);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const auto v = Op::a_n(x[m] + i, k - i);
      acc[m][0] = Op::mac(acc[m][0], v, v0);
      acc[m][1] = Op::mac(acc[m][1], v, v1);
      acc[m][2] = Op::mac(acc[m][2], v, v2);
      acc[m][3] = Op::mac(acc[m][3], v, v3);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    const v4 s = sums(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
    float* out = c + m * ldc;
    if (n == 4) {
      const v4 sum = add ? raw<v4>(out) + s : s;
      std::memcpy(out, &sum, sizeof sum);
    } else {
      for (int j = 0; j < n; j++) out[j] = add ? out[j] + s[j] : s[j];
    }
  }
}

template <class Op, int PF, int M = DM, class... Args>
MOEC_INLINE void dot_rows(int64_t m, Args... args) {
  if constexpr (M > 1) {
    if (m < M) return dot_rows<Op, PF, M - 1>(m, args...);
  }
  dot<Op, M, PF>(args...);
}

template <class W>
__attribute__((noinline)) void widen_row(const W* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + L <= n; i += L) store(to + i, load(from + i));
  if (i < n) store_n(to + i, load_n(from + i, n - i), n - i);
}

// `after`: the rows of W that are wanted after these. `room`: for 4 rows of k_block + L floats, where numbers of two
// bytes are widened once for all rows of A from the fourth pass on: before, it costs more than widening them again.
template <class Op>
void few_nk(const typename Op::A* const* a, int64_t m, int64_t k, const typename Op::W* w, int64_t ld, int64_t n,
            float* c, int64_t ldc, int64_t k_block, const typename Op::W* after, float* room) {
  constexpr bool widens = sizeof(typename Op::W) == 2 && Op::per == 1;
  const int64_t passes = (m + DM - 1) / DM, ld_room = k_block + L;
  for (int64_t j = 0; j < n; j += 4) {
    const int cols = int(n - j < 4 ? n - j : 4);
    for (int64_t k0 = 0; k0 < k; k0 += k_block) {
      const int64_t kb = k - k0 < k_block ? k - k0 : k_block;
      const auto* at = w + j * ld + k0;
      const auto* next = j + 4 < n ? at + 4 * ld : after + k0;
      const bool wide = widens && passes > 3;
      if (wide)
        for (int r = 0; r < cols; r++) widen_row(at + r * ld, kb, room + r * ld_room);
      for (int64_t p = 0; p < passes; p++) {
        const int64_t r0 = m * p / passes, rows = m * (p + 1) / passes - r0;
        float* out = c + r0 * ldc + j;
        const bool add = k0 > 0;
        if (passes == 1) {
          dot_rows<Op, 4>(rows, a + r0, k0, at, ld, cols, next, ld, kb, out, ldc, add);
        } else if (passes == 2) {
          dot_rows<Op, 2>(rows, a + r0, k0, at, ld, cols, next + 2 * p * ld, ld, kb, out, ldc, add);
        } else {
          // From the fifth pass on the next rows are in cache already; asking again costs less than another kernel.
          const auto* one = next + (p & 3) * ld;
          if constexpr (widens)
            if (wide) {
              const float* const from = room;
              dot_rows<Fma<float>, 1>(rows, a + r0, k0, from, ld_room, cols, one, ld, kb, out, ldc, add);
              continue;
            }
          dot_rows<Op, 1>(rows, a + r0, k0, at, ld, cols, one, ld, kb, out, ldc, add);
        }
      }
    }
  }
}

constexpr int ROWS_AHEAD = 16;  // of a kn matrix: far enough for main memory, few enough for the second cache

// --- few rows, kn: U rows of W at a time are added into C, which stays in cache ---------------------------------
template <class Op, int M, int U>
MOEC_INLINE void add_rows(const typename Op::A* const* a, int64_t i, const typename Op::W* w, int64_t ld, int64_t n,
                          float* c, int64_t ldc) {
  vf x[M][U];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) x[m][u] = vf{} + value(a[m][i + u]);
  constexpr int step = 64 / int(sizeof(typename Op::W)) > L ? 64 / int(sizeof(typename Op::W)) : L;
  int64_t j = 0;
  for (; j + step <= n; j += step) {
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) prefetch(w + (ROWS_AHEAD + u) * ld + j);
#pragma GCC unroll 8
    for (int v = 0; v < step; v += L) {
      vf acc[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) acc[m] = load(c + m * ldc + j + v);
#pragma GCC unroll 8
      for (int u = 0; u < U; u++) {
        const vf y = load(w + u * ld + j + v);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) acc[m] += x[m][u] * y;
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) store(c + m * ldc + j + v, acc[m]);
    }
  }
  for (; j < n; j += L) {
    const int64_t part = n - j < L ? n - j : L;
    for (int m = 0; m < M; m++) {
      vf acc = load_n(c + m * ldc + j, part);
      for (int u = 0; u < U; u++) acc += x[m][u] * load_n(w + u * ld + j, part);
      store_n(c + m * ldc + j, acc, part);
    }
  }
}

template <class Op, int M>
__attribute__((noinline)) void stream(const typename Op::A* const* a, int64_t k0, int64_t k1, const typename Op::W* w,
                                      int64_t ld, int64_t n, float* c, int64_t ldc) {
  constexpr int U = M == 1 ? 8 : M == 2 ? 4 : 2;
  int64_t i = k0;
  for (; i + U <= k1; i += U) add_rows<Op, M, U>(a, i, w + i * ld, ld, n, c, ldc);
  for (; i < k1; i++) add_rows<Op, M, 1>(a, i, w + i * ld, ld, n, c, ldc);
}

template <class Op>
void few_kn(const typename Op::A* const* a, int64_t m, int64_t k, const typename Op::W* w, int64_t ld, int64_t n,
            float* c, int64_t ldc) {
  constexpr int64_t block = 64;  // rows of W that are still in cache when the next rows of A come
  for (int64_t r = 0; r < m; r++) std::memset(c + r * ldc, 0, size_t(n) * sizeof(float));
  for (int64_t k0 = 0; k0 < k; k0 += block) {
    const int64_t k1 = k - k0 < block ? k : k0 + block;
    for (int64_t r = 0; r < m; r += 4) {
      float* out = c + r * ldc;
      if (m - r == 1) stream<Op, 1>(a + r, k0, k1, w, ld, n, out, ldc);
      else if (m - r == 2) stream<Op, 2>(a + r, k0, k1, w, ld, n, out, ldc);
      else if (m - r == 3) stream<Op, 3>(a + r, k0, k1, w, ld, n, out, ldc);
      else stream<Op, 4>(a + r, k0, k1, w, ld, n, out, ldc);
    }
  }
}

}  // namespace moec
