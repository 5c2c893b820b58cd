// One tile of C[m, n] = A[m, K] · W: streamed from the stored weights for few rows, packed into cache for many.
#pragma once
#include "tiles.hpp"

namespace moec {

constexpr int MR = MOEC_TILE_ROWS;     // rows of A in the packed micro-kernel
constexpr int NV = MOEC_TILE_VECTORS;  // vectors of columns in it
constexpr int NR = NV * L;

// --- many rows: W packed as [words of K][NR] --------------------------------------------------------------------
// Lines of memory that will be packed next, numbered row by row. They are fetched one by one at the pace of the
// arithmetic: a burst of fetches would stall it.
struct Ahead {
  const char* from;
  int64_t row, shift, first;  // bytes from row to row; log2 of the lines of a row; the first line
  MOEC_INLINE void fetch(int64_t i) const {
    i += first;
    prefetch(from + (i >> shift) * row + (i & ((1 << shift) - 1)) * 64);
  }
};
struct NothingAhead {
  MOEC_INLINE void fetch(int64_t) const {}
};

template <class Op, int M, class Next>
__attribute__((noinline)) void micro(const typename Op::A* const* a, int64_t k0, const typename Op::Word* b,
                                     int64_t words, float* c, int64_t ldc, int64_t n, bool add, Next next) {
  const typename Op::A* x[M];
  for (int m = 0; m < M; m++) x[m] = a[m] + k0;
  vf acc[M][NV] = {};
#pragma GCC unroll 2
  for (int64_t i = 0; i < words; i++) {
    next.fetch(i);
    typename Op::Word y[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) y[v] = b[i * NV + v];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[m][v] = Op::mac_one(acc[m][v], x[m] + i * Op::per, y[v]);
  }
  if (n == NR) {
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        float* out = c + m * ldc + v * L;
        store(out, add ? load(out) + acc[m][v] : acc[m][v]);
      }
    return;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      const int64_t part = n - v * L < L ? n - v * L : L;
      if (part <= 0) continue;
      float* out = c + m * ldc + v * L;
      store_n(out, add ? load_n(out, part) + acc[m][v] : acc[m][v], part);
    }
}

template <class Op, int M = MR, class... Args>
MOEC_INLINE void micro_rows(int64_t m, Args... args) {
  if constexpr (M > 1) {
    if (m < M) return micro_rows<Op, M - 1>(m, args...);
  }
  micro<Op, M>(args...);
}

// m rows of A from number k0 on against packed columns, in blocks of rows: of the vectors' kernel about as large, of
// tiles all but the last of 32. Tiles take K as far as it is a multiple of their depth, and vectors the rest.
template <class Op>
class Left {
  static_assert(!tiled<Op> || (NR == 2 * TILE && L == TILE));

 public:
  using A = typename Op::A;
  // `room` is for copies of rows, `readable` the rows that follow one another in memory: of tiles alone.
  Left(const A* const* a, int64_t m, int64_t k0, int64_t k, A* room, int64_t readable = 0)
      : a(a), m(m), k0(k0), steps(tiled<Op> ? k / TILE_DEPTH : 0), rows(whole(a, readable, room)) {}
  int64_t blocks() const { return (m + most - 1) / most; }
  int64_t begin(int64_t r) const { return tiled<Op> ? std::min(r * most, m) : m * r / blocks(); }

  // Block r of C (+)= A · B, `b` packed and `words` deep; `c` is C's first row.
  template <class Next>
  MOEC_INLINE void multiply(int64_t r, const typename Op::Word* b, int64_t words, float* c, int64_t ldc, int64_t n,
                            bool add, Next next) const {
    const int64_t r0 = begin(r), size = begin(r + 1) - r0;
    float* const out = c + r0 * ldc;
    if constexpr (!tiled<Op>) return micro_rows<Op>(size, a + r0, k0, b, words, out, ldc, n, add, next);
    else {
      const int64_t done = steps * TILE;  // words
      if (steps) tiles_at(rows, r0, size, reinterpret_cast<const char*>(b), steps, out, ldc, n, add, next);
      for (int64_t i = 0; done < words && i < size; i += MR)
        micro_rows<Op>(std::min<int64_t>(MR, size - i), a + r0 + i, k0 + steps * TILE_DEPTH, b + done * NV, words - done,
                       out + i * ldc, ldc, n, add || steps, NothingAhead{});
    }
  }

 private:
  static constexpr int64_t most = tiled<Op> ? 2 * TILE : MR;
  struct Nothing {};
  const A* const* const a;
  const int64_t m, k0, steps;
  const std::conditional_t<tiled<Op>, TileRows, Nothing> rows;

  auto whole(const A* const* from, int64_t readable, A* room) const {
    if constexpr (tiled<Op>) {
      return TileRows(from, steps ? m : 0, readable, k0, steps * TILE_DEPTH, room);
    } else return Nothing{};
  }
};

// n rows of W, k numbers each, into [words][NR]; columns past n repeat the last row, numbers past k are zero.
// Four bytes at a time are transposed: numbers, or pairs of bf16, which are widened behind the shuffles if at all.
template <class Op>
__attribute__((noinline)) void pack_nk(const typename Op::W* w, int64_t ld, int64_t n, int64_t k,
                                       typename Op::Word* to) {
  using W = typename Op::W;
  using Word = typename Op::Word;
  constexpr bool pairs = std::is_same_v<W, bf16>, wide = pairs && Op::per == 1;
  constexpr int step = L * Op::per;
  for (int v = 0; v < NV; v++) {
    const W* row[L];
    for (int j = 0; j < L; j++) row[j] = w + (v * L + j < n ? v * L + j : n - 1) * ld;
    Word* const out = to + v;
    int64_t i = 0;
    vf r[L];
    if constexpr (pairs || sizeof(W) == 4) {
      constexpr int whole = pairs ? 2 * L : L;
      for (; i + whole <= k; i += whole) {
        const void* from[L];
        for (int j = 0; j < L; j++) from[j] = row[j] + i;
        load_transposed(from, r);
#pragma GCC unroll 16
        for (int j = 0; j < L; j++) {
          if constexpr (wide) {
            out[(i + 2 * j) * NV] = (vf)((vu)r[j] << 16);
            out[(i + 2 * j + 1) * NV] = (vf)((vu)r[j] & 0xffff0000u);
          } else {
            out[(i / Op::per + j) * NV] = (Word)r[j];
          }
        }
      }
    }
    for (; i < k; i += step) {
      const int64_t part = k - i < step ? k - i : step, words = (part + Op::per - 1) / Op::per;
#pragma GCC unroll 16
      for (int j = 0; j < L; j++) r[j] = (vf)(part == step ? Op::w(row[j] + i) : Op::w_n(row[j] + i, part));
      transpose(r);
      for (int j = 0; j < words; j++) out[(i / Op::per + j) * NV] = (Word)r[j];
    }
  }
}

// k rows of W, n columns each, into panels of [words][NR] that are pitch(words) apart: row by row, since that is how
// memory likes to be read. Columns past n are zero.
MOEC_INLINE int64_t pitch(int64_t words) { return (words + 1) * NV; }  // not a power of two: panels share no cache set

template <class Op>
__attribute__((noinline)) void pack_kn(const typename Op::W* w, int64_t ld, int64_t n, int64_t k,
                                       typename Op::Word* to) {
  using Word = typename Op::Word;
  const int64_t words = (k + Op::per - 1) / Op::per, whole = n / NR;
  for (int64_t i = 0; i < words; i++) {
    const auto* row = w + i * Op::per * ld;
    const auto* below = Op::per == 2 && i * 2 + 1 < k ? row + ld : nullptr;
    Word* out = to + i * NV;
    for (int64_t p = 0; p < whole; p++, out += pitch(words)) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        const int64_t j = p * NR + v * L;
        out[v] = Op::column(row + j, below ? below + j : nullptr);
      }
    }
    if (whole * NR == n) continue;
    for (int v = 0; v < NV; v++) {
      const int64_t j = whole * NR + v * L, part = n - j < L ? n - j : L;
      out[v] = part > 0 ? Op::column_n(row + j, below ? below + j : nullptr, part) : Word{};
    }
  }
}

template <class Op, Layout layout>
void many(const typename Op::A* const* a, int64_t m, int64_t k, const typename Op::W* w, int64_t ld, int64_t n,
          float* c, int64_t ldc, int64_t k_block, void* buffer) {
  using W = typename Op::W;
  auto* const packed = static_cast<typename Op::Word*>(buffer);
  const int64_t panels = (n + NR - 1) / NR, deepest = (std::min(k, k_block) + Op::per - 1) / Op::per;
  auto* const room = reinterpret_cast<typename Op::A*>(packed + (layout == Layout::kn ? panels : 1) * pitch(deepest));
  constexpr int64_t line = 64 / sizeof(W);
  int64_t shift = 0;
  while (line << shift < n) shift++;
  for (int64_t k0 = 0; k0 < k; k0 += k_block) {
    const int64_t kb = k - k0 < k_block ? k - k0 : k_block, words = (kb + Op::per - 1) / Op::per;
    const Left<Op> left(a, m, k0, kb, room);
    const int64_t blocks = left.blocks();
    if constexpr (layout == Layout::kn) pack_kn<Op>(w + k0 * ld, ld, n, kb, packed);
    for (int64_t j = 0; j < n; j += NR) {
      const int64_t cols = n - j < NR ? n - j : NR;
      const auto* b = packed;
      if constexpr (layout == Layout::kn) b += j / NR * pitch(words);
      else pack_nk<Op>(w + j * ld + k0, ld, cols, kb, packed);
      for (int64_t r = 0; r < blocks; r++) {
        // While these rows are multiplied, a share of what is packed next is fetched.
        if constexpr (layout == Layout::nk) {
          const bool last = j + NR >= n;
          const W* next = last ? w + k0 + kb : w + (j + NR) * ld + k0;
          for (int64_t q = NR * r / blocks; q < NR * (r + 1) / blocks; q++)
            for (int64_t i = 0; i < kb; i += line) prefetch(next + q * ld + i);
        } else if (r == 0) {
          const Ahead next{reinterpret_cast<const char*>(w + (k0 + kb) * ld), ld * int64_t(sizeof(W)), shift,
                           (kb << shift) * (j / NR) / panels};
          left.multiply(r, b, words, c + j, ldc, cols, k0 > 0, next);
          continue;
        }
        left.multiply(r, b, words, c + j, ldc, cols, k0 > 0, NothingAhead{});
      }
    }
  }
}

struct Tile {
  int64_t few;       // up to this many rows W is streamed, above it is packed
  int64_t k_few;     // K is cut into blocks of these sizes
  int64_t k_many;
  void* buffer;      // room for a packed block, aligned to a vector
};

// `w`: a pointer into the stored weights, or what makes numbers of codes.
template <class Op, Layout layout, class From>
MOEC_INLINE void tile(const Tile& t, const typename Op::A* const* a, int64_t m, int64_t k, From w, int64_t ld,
                      int64_t n, float* c, int64_t ldc, From after) {
  if constexpr (!std::is_pointer_v<From>) return w.template tile<layout>(t, a, m, k, ld, n, c, ldc);
  else if constexpr (layout == Layout::panels) return Op::tile(t, a, m, k, w, ld, n, c, ldc);
  else if (m > t.few) many<Op, layout>(a, m, k, w, ld, n, c, ldc, t.k_many, t.buffer);
  else if constexpr (layout == Layout::nk) {
    float* const room = static_cast<float*>(t.buffer);
    few_nk<Op>(a, m, k, w, ld, n, c, ldc, t.k_few, after, room);
  } else few_kn<Op>(a, m, k, w, ld, n, c, ldc);
}

}  // namespace moec
