// A tile of C from matrices that their owner keeps as codes and scales: blocks of them become floats in cache.
//
// w[n, k] = code[n, k] · scale[n / rows, k / columns], rounded to P, the dtype of products; 0 rows or columns: all.
#pragma once
#include <algorithm>

#include "packed.hpp"

namespace moec {

struct int8 {
  int8_t bits;
};
// 4 bits of exponent, 3 of fraction, no infinity.
struct e4m3 {
  uint8_t bits;
};

MOEC_INLINE vf load(const int8* p) { return load(&p->bits); }
MOEC_INLINE vf load(const e4m3* p) {
  typedef uint8_t vub __attribute__((vector_size(L)));
#if MOEC_LANES == 8 && defined(__AVX2__)
  typedef char byte16 __attribute__((vector_size(16)));
  typedef long long two __attribute__((vector_size(16)));
  const vu u = (vu)__builtin_ia32_pmovzxbd256((byte16)two{raw<long long>(p), 0});
#elif MOEC_LANES == 16 && defined(__AVX512F__)
  const vu u = (vu)_mm512_cvtepu8_epi32(raw<__m128i>(p));
#else
  const vu u = __builtin_convertvector(raw<vub>(p), vu);
#endif
  const vu rest = u & 0x7f;
  // The exponent is re-biased by a multiplication, which also normalises subnormal numbers.
  const vu finite = (vu)((vf)(rest << 20) * 0x1p120f), nan = vu{} + 0x7fc00000u;
  return (vf)((u & 0x80) << 24 | (rest == 0x7f ? nan : finite));
}

template <class P>
MOEC_INLINE vf as(vf v) {
  if constexpr (sizeof(P) == 4) return v;
  P part[L];
  store(part, v);
  return load(part);
}

// Codes of type S, whose scales are shared by `rows` x `columns` of them.
template <class S, class P, int64_t rows, int64_t columns>
struct Coded : Fma<float> {
  using W = S;
};
template <class Op>
constexpr bool coded = false;
template <class S, class P, int64_t rows, int64_t columns>
constexpr bool coded<Coded<S, P, rows, columns>> = true;

// Part of one expert's matrix, for tile(): from output `first` on.
template <class Op>
struct Codes;
template <class S, class P, int64_t rows, int64_t columns>
struct Codes<Coded<S, P, rows, columns>> {
  using Float = Fma<float>;
  const S* codes;       // of output `first`
  const float* scales;  // of the whole matrix, as it lies
  int64_t scale_ld, first;

  template <Layout layout>
  float scale(int64_t n, int64_t k) const {
    const int64_t row = rows ? (first + n) / (rows ? rows : 1) : 0, column = columns ? k / (columns ? columns : 1) : 0;
    return layout == Layout::nk ? scales[row * scale_ld + column] : scales[column * scale_ld + row];
  }
  static int64_t group_end(int64_t k) { return columns ? (k / (columns ? columns : 1) + 1) * columns : ALL; }

  // Numbers [k0, k0 + k) of outputs [j, j + n) into [n][to_ld].
  __attribute__((noinline)) void widen_rows(int64_t ld, int64_t j, int64_t n, int64_t k0, int64_t k, float* to,
                                            int64_t to_ld) const {
    for (int64_t r = 0; r < n; r++) {
      const S* const from = codes + (j + r) * ld;
      float* const out = to + r * to_ld - k0;
      for (int64_t i = k0; i < k0 + k;) {
        const int64_t end = std::min(k0 + k, group_end(i));
        const vf s = vf{} + scale<Layout::nk>(j + r, i);
        for (; i + L <= end; i += L) store(out + i, as<P>(load(from + i) * s));
        if (i < end) store_n(out + i, as<P>(load_n(from + i, end - i) * s), end - i);
        i = end;
      }
    }
  }

  // Numbers [k0, k0 + k) of outputs [0, n) into panels as pack_kn makes them; `by`: room for n scales and a vector.
  __attribute__((noinline)) void widen_panels(int64_t ld, int64_t n, int64_t k0, int64_t k, vf* to, float* by) const {
    for (int64_t i = k0, end = k0; i < k0 + k; i++) {
      if (i == end) {
        for (int64_t j = 0; j < n; j++) by[j] = scale<Layout::kn>(j, i);
        end = group_end(i);
      }
      const S* const from = codes + i * ld;
      vf* out = to + (i - k0) * NV;
      for (int64_t p = 0; p < n; p += NR, out += pitch(k))
        for (int v = 0; v < NV; v++) {
          const int64_t j = p + v * L, part = std::min<int64_t>(L, n - j);
          out[v] = part > 0 ? as<P>(some(from + j, part) * load(by + j)) : vf{};
        }
    }
  }

  template <Layout layout>
  void tile(const Tile& t, const float* const* a, int64_t m, int64_t k, int64_t ld, int64_t n, float* c,
            int64_t ldc) const {
    if constexpr (layout == Layout::kn) tile_kn(t, a, m, k, ld, n, c, ldc);
    else if (m > t.few) many_nk(t, a, m, k, ld, n, c, ldc);
    else rows_nk(t, a, m, k, ld, n, c, ldc);
  }

 private:
  void rows_nk(const Tile& t, const float* const* a, int64_t m, int64_t k, int64_t ld, int64_t n, float* c,
               int64_t ldc) const {
    const int64_t passes = (m + DM - 1) / DM, wide = t.k_few + L;
    float* const w = static_cast<float*>(t.buffer);
    for (int64_t k0 = 0; k0 < k; k0 += t.k_few)
      for (int64_t j = 0; j < n; j += 4) {
        const int64_t kb = std::min(k - k0, t.k_few), cols = std::min<int64_t>(4, n - j);
        widen_rows(ld, j, cols, k0, kb, w, wide);
        for (int64_t p = 0; p < passes; p++) {
          const int64_t r0 = m * p / passes, count = m * (p + 1) / passes - r0;
          const float* const rows_w = w;
          dot_rows<Float, 1, DM, 4, 0>(count, a + r0, k0, rows_w, wide, int(cols), rows_w, wide, kb, c + r0 * ldc + j, ldc,
                             k0 > 0);
        }
      }
  }

  void many_nk(const Tile& t, const float* const* a, int64_t m, int64_t k, int64_t ld, int64_t n, float* c,
               int64_t ldc) const {
    vf* const packed = static_cast<vf*>(t.buffer);
    float* const w = reinterpret_cast<float*>(packed + (t.k_many + L) * NV);
    const int64_t wide = t.k_many + L;
    for (int64_t k0 = 0; k0 < k; k0 += t.k_many)
      for (int64_t j = 0; j < n; j += NR) {
        const int64_t kb = std::min(k - k0, t.k_many), cols = std::min<int64_t>(NR, n - j);
        widen_rows(ld, j, cols, k0, kb, w, wide);
        pack_nk<Float>(w, wide, cols, kb, packed);
        multiply(a, m, k0, packed, kb, c + j, ldc, cols);
      }
  }

  void tile_kn(const Tile& t, const float* const* a, int64_t m, int64_t k, int64_t ld, int64_t n, float* c,
               int64_t ldc) const {
    const int64_t panels = (n + NR - 1) / NR;
    vf* const packed = static_cast<vf*>(t.buffer);
    float* const by = reinterpret_cast<float*>(packed + panels * pitch(t.k_many));
    for (int64_t k0 = 0; k0 < k; k0 += t.k_many) {
      const int64_t kb = std::min(k - k0, t.k_many);
      widen_panels(ld, n, k0, kb, packed, by);
      for (int64_t p = 0; p < panels; p++)
        multiply(a, m, k0, packed + p * pitch(kb), kb, c + p * NR, ldc, std::min<int64_t>(NR, n - p * NR));
    }
  }

  static void multiply(const float* const* a, int64_t m, int64_t k0, const vf* panel, int64_t k, float* c, int64_t ldc,
                       int64_t n) {
    const int64_t blocks = (m + MR - 1) / MR;
    for (int64_t r = 0; r < blocks; r++) {
      const int64_t r0 = m * r / blocks, count = m * (r + 1) / blocks - r0;
      micro_rows<Float>(count, a + r0, k0, panel, k, c + r0 * ldc, ldc, n, k0 > 0, NothingAhead{});
    }
  }
};

}  // namespace moec
