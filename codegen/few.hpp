// Products of few rows: W is streamed as it is stored, each number of it read from memory once.
//
// A is a table of row pointers. W is nk (row n holds K numbers) or kn (row k holds the columns), `ld` elements apart.
// An Op says how a word of A meets a word of W: one number a lane (Fma), or a pair of bf16 (DotPairs).
#pragma once
#include <algorithm>

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

// --- few rows, nk: N rows of W times M rows of A, vectors along K -----------------------------------------------
// `next` are rows of weights that will be needed soon: PF of them are fetched into cache at the pace of the arithmetic.
// Where vectors are long, a line of each row of W is a vector, and these are fetched once more, into the first cache: loads
// that wait for the second keep the core from asking memory for more. One to six rows go 5 to 40 % faster so.
constexpr int NEAR = 8;                        // lines ahead
constexpr int GROUPS_AHEAD = L == 16 ? 2 : 1;  // of N rows: one is too near where rows are short

template <class Op, int M, int N, int PF, class Next>
__attribute__((noinline)) void dot(const typename Op::A* const* a, int64_t k0, const typename Op::W* w, int64_t ld,
                                   int n, const Next* next, int64_t next_ld, int64_t k, float* c, int64_t ldc,
                                   bool add) {
  using W = typename Op::W;
  constexpr int step = L * Op::per, line = 64 / int(sizeof(W)), unroll = line > step ? line / step : 1;
  const W* const w0 = w;
  const W* const w1 = w + (n > 1 ? 1 : 0) * ld;
  const W* const w2 = w + (n > 2 ? 2 : n - 1) * ld;
  const W* const w3 = w + (n > 3 ? 3 : n - 1) * ld;
  const typename Op::A* x[M];
  for (int m = 0; m < M; m++) x[m] = a[m] + k0;
  vf acc[M][4] = {};
  auto add_step = [&](auto&& of_a, auto&& of_w) MOEC_INLINE_LAMBDA {
    auto v0 = of_w(w0), v1 = of_w(w1);
    typename Op::Word v2{}, v3{};
    if constexpr (N > 2) v2 = of_w(w2);
    if constexpr (N > 3) v3 = of_w(w3);
    keep(v0), keep(v1), keep(v2), keep(v3);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const auto v = of_a(x[m]);
      acc[m][0] = Op::mac(acc[m][0], v, v0);
      acc[m][1] = Op::mac(acc[m][1], v, v1);
      if constexpr (N > 2) acc[m][2] = Op::mac(acc[m][2], v, v2);
      if constexpr (N > 3) acc[m][3] = Op::mac(acc[m][3], v, v3);
    }
  };
  auto body = [&](int64_t i) MOEC_INLINE_LAMBDA {
    add_step([=](const auto* p) MOEC_INLINE_LAMBDA { return Op::a(p + i); },
             [=](const auto* p) MOEC_INLINE_LAMBDA { return Op::w(p + i); });
  };
  int64_t i = 0;
  for (; i + unroll * step <= k; i += unroll * step) {
#pragma GCC unroll 4
    for (int p = 0; p < PF; p++) prefetch(next + p * next_ld + i);
    if constexpr (L == 16) {
#pragma GCC unroll 4
      for (int p = 0; p < N; p++) prefetch_near(w + p * ld + i + NEAR * line);
    }
#pragma GCC unroll 4
    for (int u = 0; u < unroll; u++) body(i + u * step);
  }
  for (; i + step <= k; i += step) body(i);
  if (i < k)
    add_step([=](const auto* p) MOEC_INLINE_LAMBDA { return Op::a_n(p + i, k - i); },
             [=](const auto* p) MOEC_INLINE_LAMBDA { return Op::w_n(p + i, k - i); });
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

// LEAST to M rows of A.
template <class Op, int LEAST, int M, int N, int PF, class... Args>
MOEC_INLINE void dot_rows(int64_t m, Args... args) {
  if constexpr (M > LEAST) {
    if (m < M) return dot_rows<Op, LEAST, M - 1, N, PF>(m, args...);
  }
  dot<Op, M, N, PF>(args...);
}

// How few rows of A a pass can have where more than M are cut into `passes` or more of at most M.
constexpr int least_rows(int M, int passes) { return ((passes - 1) * M + 1) / passes; }

template <class W>
__attribute__((noinline)) void widen_row(const W* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + L <= n; i += L) store(to + i, load(from + i));
  if (i < n) store_n(to + i, load_n(from + i, n - i), n - i);
}

// The size of k's blocks where all of them are about as large, and whole cache lines.
MOEC_INLINE int64_t evened(int64_t k, int64_t k_block) {
  const int64_t blocks = (k + k_block - 1) / k_block;
  return std::min(k_block, (k / std::max<int64_t>(blocks, 1) + 63) / 64 * 64);
}

// LEAST rows of A or more, M at a time, and where `once` no more than M. `after`: the rows of W wanted after these.
template <class Op, int LEAST, int M, int N, bool once>
void few_by(const typename Op::A* const* a, int64_t m, int64_t k, const typename Op::W* w, int64_t ld, int64_t n,
            float* c, int64_t ldc, int64_t k_block, const typename Op::W* after) {
  // Where vectors are short, one pass over floats goes no faster than memory, and the hardware's own fetching keeps up
  // with it: asking costs a tenth more time. Over numbers of two bytes it falls behind, since each run of memory is half
  // as long; in long vectors four runs at a time are too many for it anyway, and asking takes a fifth off.
  constexpr int by_one = sizeof(typename Op::W) == 4 && L < 16 ? 0 : N;
  k_block = evened(k, k_block);
  const int64_t passes = once ? 1 : (m + M - 1) / M;
  for (int64_t j = 0; j < n; j += N) {
    const int cols = int(n - j < N ? n - j : N);
    for (int64_t k0 = 0; k0 < k; k0 += k_block) {
      const int64_t kb = k - k0 < k_block ? k - k0 : k_block;
      const auto* at = w + j * ld + k0;
      const int64_t then = j + GROUPS_AHEAD * N;
      const auto* next = (then < n ? w + then * ld : after + (then - n) * ld) + k0;
      for (int64_t p = 0; p < passes; p++) {
        const int64_t r0 = m * p / passes, rows = m * (p + 1) / passes - r0;
        float* out = c + r0 * ldc + j;
        const bool add = k0 > 0;
        // Each pass fetches its share of the next rows. Of more passes than rows those beyond ask for the last one again,
        // which costs less than more kernels.
        const int64_t from = std::min<int64_t>(p * N / std::min<int64_t>(passes, N), N - 1);
        const int64_t share = passes <= N ? (p + 1) * N / passes - from : 1;
        const auto* const ahead = next + from * ld;
        if (passes == 1) dot_rows<Op, LEAST, M, N, by_one>(rows, a + r0, k0, at, ld, cols, next, ld, kb, out, ldc, add);
        else if constexpr (!once) {
          constexpr int least = least_rows(M, 2);
          if (share == 2) dot_rows<Op, least, M, N, 2>(rows, a + r0, k0, at, ld, cols, ahead, ld, kb, out, ldc, add);
          else dot_rows<Op, least, M, N, 1>(rows, a + r0, k0, at, ld, cols, ahead, ld, kb, out, ldc, add);
        }
      }
    }
  }
}

// The same where numbers of W are widened once for all rows of A, into `room` for 4 rows of k_block + L floats.
template <class W>
void few_wide(const float* const* a, int64_t m, int64_t k, const W* w, int64_t ld, int64_t n, float* c, int64_t ldc,
              int64_t k_block, const W* after, float* room) {
  const int64_t passes = (m + DM - 1) / DM, wide = k_block + L;
  for (int64_t j = 0; j < n; j += 4) {
    const int cols = int(n - j < 4 ? n - j : 4);
    for (int64_t k0 = 0; k0 < k; k0 += k_block) {
      const int64_t kb = k - k0 < k_block ? k - k0 : k_block;
      const auto* at = w + j * ld + k0;
      const auto* next = j + 4 < n ? at + 4 * ld : after + k0;
      for (int r = 0; r < cols; r++) widen_row(at + r * ld, kb, room + r * wide);
      for (int64_t p = 0; p < passes; p++) {
        const int64_t r0 = m * p / passes, rows = m * (p + 1) / passes - r0;
        const float* const from = room;
        const W* const ahead = next + std::min<int64_t>(p, 3) * ld;
        dot_rows<Fma<float>, least_rows(DM, 4), DM, 4, 1>(rows, a + r0, k0, from, wide, cols, ahead, ld, kb,
                                                          c + r0 * ldc + j, ldc, k0 > 0);
      }
    }
  }
}

constexpr int64_t WIDE = 20;  // from more rows of A on widening numbers of W once pays

constexpr int64_t NUMBERS_AHEAD = 1024;  // of a row of W that is read alone

// One row of A where vectors are long: row after row of W, so that memory is read as one run. Four runs at a time take up
// to a tenth longer there; for two rows of A and more they are faster.
template <class Op>
__attribute__((noinline)) void one_nk(const typename Op::A* x, int64_t k, const typename Op::W* w, int64_t ld, int64_t n,
                                      float* c) {
  constexpr int step = L * Op::per;
  for (int64_t j = 0; j < n; j += 4) {
    const int rows = int(n - j < 4 ? n - j : 4);
    vf sum[4] = {};
    for (int r = 0; r < rows; r++, w += ld) {
      vf acc[4] = {};
      int64_t i = 0;
      for (; i + 4 * step <= k; i += 4 * step)
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) {
          prefetch(w + i + u * step + NUMBERS_AHEAD);
          acc[u] = Op::mac(acc[u], Op::a(x + i + u * step), Op::w(w + i + u * step));
        }
      for (; i + step <= k; i += step) acc[0] = Op::mac(acc[0], Op::a(x + i), Op::w(w + i));
      if (i < k) acc[1] = Op::mac(acc[1], Op::a_n(x + i, k - i), Op::w_n(w + i, k - i));
      sum[r] = (acc[0] + acc[1]) + (acc[2] + acc[3]);
    }
    const v4 s = sums(sum[0], sum[1], sum[2], sum[3]);
    std::memcpy(c + j, &s, size_t(rows) * sizeof(float));
  }
}

// Numbers of two bytes are widened for each kernel's rows of A anew: with few registers three rows of W meet four of A
// rather than four three, which takes a fifth less time in cache. One to three rows wait for memory, which likes four
// streams.
template <class Op>
void few_nk(const typename Op::A* const* a, int64_t m, int64_t k, const typename Op::W* w, int64_t ld, int64_t n,
            float* c, int64_t ldc, int64_t k_block, const typename Op::W* after, float* room) {
  constexpr bool widened = sizeof(typename Op::W) == 2 && Op::per == 1;
  if constexpr (L == 16) {
    if (m == 1) return one_nk<Op>(a[0], k, w, ld, n, c);
  }
  if constexpr (widened) {
    if (m > WIDE) return few_wide(a, m, k, w, ld, n, c, ldc, k_block, after, room);
  }
  if constexpr (widened && DM < 4) {
    if (m > DM) few_by<Op, DM + 1, 4, DM, false>(a, m, k, w, ld, n, c, ldc, k_block, after);
    else few_by<Op, 1, DM, 4, true>(a, m, k, w, ld, n, c, ldc, k_block, after);
  } else {
    few_by<Op, 1, DM, 4, false>(a, m, k, w, ld, n, c, ldc, k_block, after);
  }
}

// --- few rows, kn: V vectors of columns times M rows of A, sums in registers ------------------------------------
constexpr int KN_ROWS = DM < 4 ? 4 : 6;  // rows of A at a time: 16 registers hold 12 sums, 32 hold 24
constexpr int64_t KN_DEPTH = 64;         // rows of W that are still in cache when the next rows of A come

// Vectors of columns beside M rows of A.
constexpr int kn_vectors(int M) {
  if (DM < 4) return M == 1 ? 8 : M == 2 ? 4 : M == 3 ? 3 : 2;
  return M == 1 ? 16 : M < 4 ? 8 : 4;
}

// V vectors of columns of C (+)= A · W over k rows of W; the same columns of the rows KN_DEPTH further are fetched.
template <class Op, int M, int V, bool FETCH>
__attribute__((noinline)) void columns(const typename Op::A* const* a, int64_t k0, int64_t k, const typename Op::W* w,
                                       int64_t ld, float* c, int64_t ldc, bool add) {
  using W = typename Op::W;
  constexpr int64_t line = 64 / int64_t(sizeof(W));
  const int64_t words = (k + Op::per - 1) / Op::per;
  const typename Op::A* x[M];
  for (int m = 0; m < M; m++) x[m] = a[m] + k0;
  vf acc[M][V] = {};
  for (int64_t i = 0; i < words; i++, w += Op::per * ld) {
    if constexpr (FETCH) {
#pragma GCC unroll 2
      for (int r = 0; r < Op::per; r++)
#pragma GCC unroll 16
        for (int64_t j = 0; j < V * L; j += line) prefetch(w + (KN_DEPTH + r) * ld + j);
    }
    const W* const below = Op::per == 2 && 2 * i + 1 < k ? w + ld : nullptr;
    typename Op::Word y[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) y[v] = Op::column(w + v * L, below ? below + v * L : nullptr), keep(y[v]);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) acc[m][v] = Op::mac_one(acc[m][v], x[m] + i * Op::per, y[v]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
      float* const out = c + m * ldc + v * L;
      store(out, add ? load(out) + acc[m][v] : acc[m][v]);
    }
}

// The n columns that fill no vector.
template <class Op>
MOEC_COLD void last_columns(int64_t m, const typename Op::A* const* a, int64_t k0, int64_t k, const typename Op::W* w,
                            int64_t ld, int64_t n, float* c, int64_t ldc, bool add) {
  for (int64_t r = 0; r < m; r++) {
    vf acc{};
    for (int64_t i = 0; i < k; i += Op::per) {
      const auto* const row = w + i * ld;
      acc = Op::mac_one(acc, a[r] + k0 + i, Op::column_n(row, Op::per == 2 && i + 1 < k ? row + ld : nullptr, n));
    }
    float* const out = c + r * ldc;
    store_n(out, add ? load_n(out, n) + acc : acc, n);
  }
}

// k rows of W from row k0 of A's numbers on.
template <class Op, int M, bool FETCH>
void all_columns(int64_t m, const typename Op::A* const* a, int64_t k0, int64_t k, const typename Op::W* w, int64_t ld,
                 int64_t n, float* c, int64_t ldc, bool add) {
  if constexpr (M > 1) {
    if (m < M) return all_columns<Op, M - 1, FETCH>(m, a, k0, k, w, ld, n, c, ldc, add);
  }
  constexpr int V = kn_vectors(M);
  int64_t j = 0;
  for (; j + V * L <= n; j += V * L) columns<Op, M, V, FETCH>(a, k0, k, w + j, ld, c + j, ldc, add);
  for (; j + L <= n; j += L) columns<Op, M, 1, FETCH>(a, k0, k, w + j, ld, c + j, ldc, add);
  if (j < n) last_columns<Op>(m, a, k0, k, w + j, ld, n - j, c + j, ldc, add);
}

constexpr int ONE_KN = 8, ROWS_AHEAD = 16;  // rows of W at a time; far enough for main memory, few enough for cache

// One row of A that numbers of W are multiplied with one by one: U rows of W at a time are added into C, which stays in
// cache. Memory is read as U runs, which takes a sixth less time than column after column of one row.
template <class Op, int U>
MOEC_INLINE void add_rows(const float* a, const typename Op::W* w, int64_t ld, int64_t n, float* c) {
  vf x[U];
#pragma GCC unroll 8
  for (int u = 0; u < U; u++) x[u] = vf{} + a[u];
  constexpr int step = 64 / int(sizeof(typename Op::W)) > L ? 64 / int(sizeof(typename Op::W)) : L;
  int64_t j = 0;
  for (; j + step <= n; j += step) {
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) prefetch(w + (ROWS_AHEAD + u) * ld + j);
#pragma GCC unroll 8
    for (int v = 0; v < step; v += L) {
      vf acc = load(c + j + v);
#pragma GCC unroll 8
      for (int u = 0; u < U; u++) acc += x[u] * load(w + u * ld + j + v);
      store(c + j + v, acc);
    }
  }
  for (; j < n; j += L) {
    const int64_t part = std::min<int64_t>(L, n - j);
    vf acc = load_n(c + j, part);
    for (int u = 0; u < U; u++) acc += x[u] * load_n(w + u * ld + j, part);
    store_n(c + j, acc, part);
  }
}

template <class Op>
__attribute__((noinline)) void one_kn(const float* a, int64_t k, const typename Op::W* w, int64_t ld, int64_t n,
                                      float* c) {
  std::memset(c, 0, size_t(n) * sizeof(float));
  int64_t i = 0;
  for (; i + ONE_KN <= k; i += ONE_KN) add_rows<Op, ONE_KN>(a + i, w + i * ld, ld, n, c);
  for (; i < k; i++) add_rows<Op, 1>(a + i, w + i * ld, ld, n, c);
}

template <class Op>
void few_kn(const typename Op::A* const* a, int64_t m, int64_t k, const typename Op::W* w, int64_t ld, int64_t n,
            float* c, int64_t ldc) {
  if constexpr (Op::per == 1) {
    if (m == 1) return one_kn<Op>(a[0], k, w, ld, n, c);
  }
  const int64_t blocks = (m + KN_ROWS - 1) / KN_ROWS;
  for (int64_t k0 = 0; k0 < k; k0 += KN_DEPTH) {
    const int64_t kb = std::min(KN_DEPTH, k - k0);
    for (int64_t r = 0; r < blocks; r++) {
      const int64_t r0 = m * r / blocks, rows = m * (r + 1) / blocks - r0;
      if (r == 0) all_columns<Op, KN_ROWS, true>(rows, a, k0, kb, w + k0 * ld, ld, n, c, ldc, k0 > 0);
      else all_columns<Op, KN_ROWS, false>(rows, a + r0, k0, kb, w + k0 * ld, ld, n, c + r0 * ldc, ldc, k0 > 0);
    }
  }
}

}  // namespace moec
