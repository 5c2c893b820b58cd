// A tile of C from a kernel's own copy of the weights: panels of NR columns, all of K one after the other in memory.
//
// Few rows: a panel is streamed once and widened in registers. More: blocks of it are widened into cache, or read as
// they are, and multiplied like freshly packed ones. int8 panels hold a scale a column before each `group` numbers.
#pragma once
#include <algorithm>

#include "gemm.hpp"

namespace moec {

constexpr int STREAMED = MR / 2;  // up to this many rows a panel is widened in registers, above it in cache

typedef int8_t vb __attribute__((vector_size(L)));
MOEC_INLINE vf load(const int8_t* p) {
#if MOEC_LANES == 8 && defined(__AVX2__)
  typedef char byte16 __attribute__((vector_size(16)));
  typedef long long two __attribute__((vector_size(16)));
  return __builtin_convertvector((vi)__builtin_ia32_pmovsxbd256((byte16)two{raw<long long>(p), 0}), vf);
#elif MOEC_LANES == 16 && defined(__AVX512F__)
  return __builtin_convertvector((vi)_mm512_cvtepi8_epi32(raw<__m128i>(p)), vf);
#else
  return __builtin_convertvector(__builtin_convertvector(raw<vb>(p), vi), vf);
#endif
}

template <class Op>
void tile_panels(const Tile& t, const typename Op::A* const* a, int64_t m, int64_t k, const typename Op::W* w,
                 int64_t ld, int64_t n, float* c, int64_t ldc);

// Numbers of type S in panels. `numbers` share a scale; 0: there is none, all: all of K.
constexpr int64_t ALL = int64_t(1) << 40;
template <class S, int64_t numbers = 0>
struct Panels {
  using A = float;
  using W = S;
  using Word = vf;
  static constexpr int per = 1;
  static constexpr int64_t group = numbers ? numbers : ALL;
  static constexpr bool scaled = numbers > 0, direct = sizeof(S) == 4;
  static MOEC_INLINE Word word(const W* p) { return load(p); }
  static MOEC_INLINE vf mac_one(vf acc, const A* p, Word y) { return acc + *p * y; }
  template <class... Args>
  static MOEC_INLINE void tile(Args... args) { tile_panels<Panels>(args...); }
};

// Pairs of bf16, as DotPairs multiplies them.
struct PanelPairs : DotPairs {
  static constexpr int64_t group = ALL;
  static constexpr bool scaled = false, direct = true;
  static MOEC_INLINE Word word(const W* p) { return raw<Word>(p); }
  template <class... Args>
  static MOEC_INLINE void tile(Args... args) { tile_panels<PanelPairs>(args...); }
};

struct PanelTiles : PanelPairs, Tiled {
  template <class... Args>
  static MOEC_INLINE void tile(Args... args) { tile_panels<PanelTiles>(args...); }
};

// Of one panel: where the group of number `i` of K begins.
template <class Op>
MOEC_INLINE const typename Op::W* group_at(const typename Op::W* panel, int64_t i) {
  if constexpr (!Op::scaled) return panel;
  else return panel + i / Op::group * (NR * (Op::group + 4));
}

template <class Op>
MOEC_INLINE void scales(const typename Op::W* group, vf (&s)[NV]) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; v++) s[v] = raw<vf>(reinterpret_cast<const char*>(group) + 4 * L * v);
}

template <class Op, int M>
__attribute__((noinline)) void stream_panel(const typename Op::A* const* a, const typename Op::W* panel, int64_t k,
                                            float* c, int64_t ldc, int64_t n) {
  constexpr int U = M == 1 ? 4 : 2;  // sums side by side, or the multiply-add's latency would be the limit
  constexpr int64_t row = NR * Op::per, line = 64 / sizeof(typename Op::W), ahead = 24 * line;
  const int64_t words = (k + Op::per - 1) / Op::per;
  const typename Op::A* x[M];
  for (int m = 0; m < M; m++) x[m] = a[m];
  vf acc[M][NV] = {};
  const typename Op::W* at = panel;
  for (int64_t g = 0; g < words; g += Op::group) {
    const int64_t end = std::min(Op::group, words - g);
    vf s[NV];
    if constexpr (Op::scaled) scales<Op>(at, s), at += 4 * NR;
    vf part[U][M][NV] = {};
    auto add = [&](int u, int64_t i) MOEC_INLINE_LAMBDA {
      typename Op::Word y[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) y[v] = Op::word(at + i * row + v * L * Op::per);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) part[u][m][v] = Op::mac_one(part[u][m][v], x[m] + (g + i) * Op::per, y[v]);
    };
    int64_t i = 0;
    for (; i + U <= end; i += U) {
#pragma GCC unroll 8
      for (int64_t b = 0; b < U * row; b += line) {
        prefetch(at + i * row + ahead + b);
        if constexpr (L == 16) prefetch_near(at + i * row + NEAR * line + b);
      }
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) add(u, i + u);
    }
    for (; i < end; i++) add(0, i);
    at += end * row;
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        vf sum = part[0][m][v];
        for (int u = 1; u < U; u++) sum += part[u][m][v];
        if constexpr (Op::scaled) sum *= s[v];
        acc[m][v] += sum;
      }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < NV; v++) {
      const int64_t part = n - v * L;
      if (part >= L) store(c + m * ldc + v * L, acc[m][v]);
      else if (part > 0) store_n(c + m * ldc + v * L, acc[m][v], part);
    }
}

template <class Op, int M = STREAMED, class... Args>
MOEC_INLINE void stream_rows(int64_t m, Args... args) {
  if constexpr (M > 1) {
    if (m < M) return stream_rows<Op, M - 1>(m, args...);
  }
  stream_panel<Op, M>(args...);
}

// Numbers [k0, k0 + kb) of a panel as words, scales applied.
template <class Op>
__attribute__((noinline)) void widen_panel(const typename Op::W* panel, int64_t k0, int64_t kb, typename Op::Word* to) {
  for (int64_t i = k0; i < k0 + kb;) {
    const int64_t first = i / Op::group * Op::group, end = std::min(k0 + kb, first + Op::group);
    const typename Op::W* group = group_at<Op>(panel, i);
    vf s[NV];
    if constexpr (Op::scaled) scales<Op>(group, s), group += 4 * NR;
    for (; i < end; i++) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        const vf y = Op::word(group + (i - first) * NR + v * L);
        if constexpr (Op::scaled) *to++ = y * s[v];
        else *to++ = y;
      }
    }
  }
}

template <class Op>
void tile_panels(const Tile& t, const typename Op::A* const* a, int64_t m, int64_t k, const typename Op::W* w,
                 int64_t ld, int64_t n, float* c, int64_t ldc) {
  using Word = typename Op::Word;
  if (m <= STREAMED) {
    for (int64_t j = 0; j < n; j += NR) stream_rows<Op>(m, a, w + j * ld, k, c + j, ldc, std::min<int64_t>(NR, n - j));
    return;
  }
  // Memory is the limit of few rows: they take a panel from end to end, which it likes best. Tiles may want a copy of them.
  const int64_t block = Op::direct && !tiled<Op> && m <= 2 * MR ? k : t.k_many;
  for (int64_t k0 = 0; k0 < k; k0 += block) {
    const int64_t kb = std::min(block, k - k0), words = (kb + Op::per - 1) / Op::per;
    const Left<Op> left(a, m, k0, kb, static_cast<typename Op::A*>(t.buffer));
    for (int64_t j = 0; j < n; j += NR) {
      const int64_t cols = std::min<int64_t>(NR, n - j);
      const typename Op::W* const panel = w + j * ld;
      const Word* b = static_cast<Word*>(t.buffer);
      if constexpr (Op::direct) b = reinterpret_cast<const Word*>(panel + k0 * NR);
      else widen_panel<Op>(panel, k0, kb, static_cast<Word*>(t.buffer));
      // While the first rows are multiplied the next panel's block is fetched.
      const typename Op::W* const next = group_at<Op>(panel + NR * ld, k0) + k0 % Op::group * NR;
      for (int64_t r = 0; r < left.blocks(); r++) {
        if (r == 0) {
          const Ahead ahead{reinterpret_cast<const char*>(next), NR * int64_t(sizeof(typename Op::W)) * Op::per, 0, 0};
          left.multiply(r, b, words, c + j, ldc, cols, k0 > 0, ahead);
        } else {
          left.multiply(r, b, words, c + j, ldc, cols, k0 > 0, NothingAhead{});
        }
      }
    }
  }
}

}  // namespace moec
