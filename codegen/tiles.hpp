// Tiles of AMX: 16 rows of bf16 meet 16 columns of it in one instruction, 32 numbers deep, with fp32 sums.
//
// Where the compiler may not use these instructions they are emulated, with the checks of shapes that hardware makes.
// Tiles 0 to 3 hold sums, two by two; 4 and 5 rows of A; 6 and 7 columns of B, which are packed as pairs.
#pragma once
#include "few.hpp"
#if !defined(__AMX_BF16__)
#include <cstdlib>
#endif

namespace moec {

constexpr int TILE = 16;        // rows of a tile; each has 64 bytes
constexpr int TILE_DEPTH = 32;  // numbers of bf16 in a row

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
};

#if defined(__AMX_BF16__)
// Written out, since the compiler's own forms of loads do not say that they read memory.
MOEC_INLINE void tile_configure(const TileShapes& s) { asm volatile("ldtilecfg %0" : : "m"(s)); }
MOEC_INLINE void tile_release() { asm volatile("tilerelease"); }
template <int T>
MOEC_INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
template <int T>
MOEC_INLINE void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
MOEC_INLINE void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
MOEC_INLINE void tile_dot() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B)); }
#else
struct Emulated {
  TileShapes shapes;
  uint32_t words[8][TILE][TILE];
  bool configured = false;

  // Hardware raises #UD, which ends the process.
  void must(bool fine) const {
    if (!configured || !fine) std::abort();
  }
};
inline thread_local Emulated emulated;

MOEC_INLINE void tile_configure(const TileShapes& s) {
  emulated.shapes = s, emulated.configured = true;
  bool fine = s.palette == 1 && s.start == 0 && reinterpret_cast<uintptr_t>(&s) % 64 == 0;
  for (int t = 0; t < 16; t++)
    fine = fine && (t < 8 ? s.rows[t] <= TILE && s.bytes[t] <= 64 && s.bytes[t] % 4 == 0 : !s.rows[t] && !s.bytes[t]);
  emulated.must(fine);
}
MOEC_INLINE void tile_release() { emulated.configured = false; }
template <int T>
void tile_zero() { emulated.must(true), std::memset(emulated.words[T], 0, sizeof emulated.words[T]); }
template <int T>
void tile_load(const void* p, int64_t stride) {
  tile_zero<T>();
  for (int r = 0; r < emulated.shapes.rows[T]; r++)
    std::memcpy(emulated.words[T][r], static_cast<const char*>(p) + r * stride, emulated.shapes.bytes[T]);
}
template <int T>
void tile_store(void* p, int64_t stride) {
  emulated.must(true);
  for (int r = 0; r < emulated.shapes.rows[T]; r++)
    std::memcpy(static_cast<char*>(p) + r * stride, emulated.words[T][r], emulated.shapes.bytes[T]);
}
template <int C, int A, int B>
void tile_dot() {
  const TileShapes& s = emulated.shapes;
  const int m = s.rows[C], n = s.bytes[C] / 4, k = s.bytes[A] / 4;
  emulated.must(s.rows[A] == m && s.rows[B] == k && s.bytes[B] / 4 == n);
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      float low = 0, high = 0;
      for (int p = 0; p < k; p++) {
        const uint32_t a = emulated.words[A][i][p], b = emulated.words[B][p][j];
        low += float_of(a << 16) * float_of(b << 16);
        high += float_of(a & 0xffff0000u) * float_of(b & 0xffff0000u);
      }
      uint32_t& to = emulated.words[C][i][j];
      to = bits_of(float_of(to) + (low + high));
    }
}
#endif

struct Tiled {};  // a base of every Op whose many rows meet packed columns in tiles
template <class Op>
constexpr bool tiled = std::is_base_of_v<Tiled, Op>;

struct TilePairs : DotPairs, Tiled {};

// Tiles as they are wanted here, for as long as it lives; every thread has its own.
template <class Op>
struct TileState {
  TileState() {
    if constexpr (tiled<Op>) tile_configure(TileShapes{});
  }
  ~TileState() {
    if constexpr (tiled<Op>) tile_release();
  }
  TileState(const TileState&) = delete;
};

// Rows of A in groups of 16, numbers [k0, k0 + depth) of each: where they lie, if that is at even distances, or a copy.
// The last group is a copy where it has fewer rows and those behind them may not be read; what a row holds there is of
// no consequence to others.
class TileRows {
 public:
  // `a`: m rows at k0, of which `readable` follow one another in memory.
  TileRows(const bf16* const* a, int64_t m, int64_t readable, int64_t k0, int64_t depth, bf16* room)
      : lines(depth / TILE_DEPTH | 1) {
    const int64_t step = m > 1 ? distance(a[0], a[1]) : 0;
    bool even = true;
    for (int64_t r = 1; even && r < m; r++) even = distance(a[r - 1], a[r]) == step;
    const int64_t whole = m / TILE * TILE;
    in_place = even ? (readable >= (m + TILE - 1) / TILE * TILE ? m : whole) : 0;
    base = a[0] + k0, stride = step, copies = room;
    for (int64_t r = in_place; r < m; r++)
      std::memcpy(room + (r - in_place) * lines * TILE_DEPTH, a[r] + k0, size_t(depth) * sizeof(bf16));
  }
  // Numbers of room for `m` rows of at most `depth` numbers.
  static constexpr int64_t room(int64_t m, int64_t depth) {
    return (m + TILE - 1) / TILE * TILE * (depth / TILE_DEPTH | 1) * TILE_DEPTH;
  }
  struct Group {
    const bf16* at;
    int64_t stride;  // in bytes
  };
  // Rows [r, r + 16), r a multiple of 16.
  Group group(int64_t r) const {
    if (r < in_place) return {reinterpret_cast<const bf16*>(reinterpret_cast<const char*>(base) + r * stride), stride};
    return {copies + (r - in_place) * lines * TILE_DEPTH, lines * TILE_DEPTH * int64_t(sizeof(bf16))};
  }

 private:
  const int64_t lines;  // of a copied row: an odd number, so that rows do not evict each other
  const bf16* base;
  const bf16* copies;
  int64_t stride, in_place;
  static int64_t distance(const bf16* a, const bf16* b) {
    return reinterpret_cast<intptr_t>(b) - reinterpret_cast<intptr_t>(a);
  }
};

// C[16 or 32, 32] (+)= A · B over `steps` times 32 numbers. `b` is packed as pairs, 32 columns side by side.
template <int groups, class Next>
__attribute__((noinline)) void micro_tiles(TileRows::Group x, TileRows::Group y, const char* b, int64_t steps, float* c,
                                           int64_t ldc, bool add, Next next) {
  static_assert(groups == 1 || groups == 2);
  constexpr int64_t half = 64, row = 2 * half;  // bytes of 16 packed pairs, and of 32
  const int64_t stride = ldc * 4;
  float* const below = c + TILE * ldc;
  if (add) {
    tile_load<0>(c, stride), tile_load<1>(c + TILE, stride);
    if constexpr (groups == 2) tile_load<2>(below, stride), tile_load<3>(below + TILE, stride);
  } else {
    tile_zero<0>(), tile_zero<1>();
    if constexpr (groups == 2) tile_zero<2>(), tile_zero<3>();
  }
  for (int64_t s = 0; s < steps; s++, b += TILE * row) {
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i++) next.fetch(s * TILE + i);
    tile_load<6>(b, row), tile_load<4>(x.at + s * TILE_DEPTH, x.stride);
    tile_dot<0, 4, 6>();
    tile_load<7>(b + half, row);
    tile_dot<1, 4, 7>();
    if constexpr (groups == 2) {
      tile_load<5>(y.at + s * TILE_DEPTH, y.stride);
      tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
    }
  }
  tile_store<0>(c, stride), tile_store<1>(c + TILE, stride);
  if constexpr (groups == 2) tile_store<2>(below, stride), tile_store<3>(below + TILE, stride);
}

// The same for up to 32 rows and columns: sums of fewer are made apart from C.
template <class Next>
void tiles_at(const TileRows& rows, int64_t r, int64_t m, const char* b, int64_t steps, float* c, int64_t ldc, int64_t n,
              bool add, Next next) {
  const bool two = m > TILE, whole = n == 2 * TILE && m % TILE == 0;
  const TileRows::Group x = rows.group(r), y = two ? rows.group(r + TILE) : x;
  alignas(64) float apart[2 * TILE * 2 * TILE];
  float* const to = whole ? c : apart;
  const int64_t ld = whole ? ldc : 2 * TILE;
  if (!whole && add)
    for (int64_t i = 0; i < m; i++) std::memcpy(apart + i * ld, c + i * ldc, size_t(n) * sizeof(float));
  if (two) micro_tiles<2>(x, y, b, steps, to, ld, add, next);
  else micro_tiles<1>(x, y, b, steps, to, ld, add, next);
  if (!whole)
    for (int64_t i = 0; i < m; i++) std::memcpy(c + i * ldc, apart + i * ld, size_t(n) * sizeof(float));
}

}  // namespace moec
