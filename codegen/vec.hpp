// Vectors of MOEC_LANES floats over the compiler's vector extension, and the three storage types.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX512F__) || defined(__AVX512BF16__)
#include <immintrin.h>  // not for AVX2: reading it would take a quarter of a build's time
#endif

#define MOEC_INLINE inline __attribute__((always_inline))
#define MOEC_INLINE_LAMBDA __attribute__((always_inline))
#define MOEC_COLD __attribute__((noinline))  // edges of tiles: rare, and inlining them costs build time

namespace moec {

constexpr int L = MOEC_LANES;
typedef float vf __attribute__((vector_size(4 * L)));
typedef int32_t vi __attribute__((vector_size(4 * L)));
typedef uint32_t vu __attribute__((vector_size(4 * L)));
typedef uint16_t vh __attribute__((vector_size(2 * L)));
typedef float v4 __attribute__((vector_size(16)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
enum Dtype : int64_t { F32 = 0, BF16 = 1, F16 = 2 };

MOEC_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
MOEC_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// --- one number ---------------------------------------------------------------------------------------------
MOEC_INLINE float value(float x) { return x; }
MOEC_INLINE float value(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
MOEC_INLINE float value(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  // The exponent is re-biased by a multiplication, which also normalises subnormal numbers.
  const float scaled = float_of(rest << 13) * 0x1p112f;
  return float_of(sign | (rest >= 0x7c00 ? 0x7f800000u | (rest & 0x3ff) << 13 : bits_of(scaled)));
}

template <class T>
T narrow(float x);
template <>
MOEC_INLINE float narrow<float>(float x) { return x; }
template <>
MOEC_INLINE bf16 narrow<bf16>(float x) {
  const uint32_t u = bits_of(x);
  if (x != x) return {0x7fc0};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <>
MOEC_INLINE f16 narrow<f16>(float x) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (magnitude < 0x38800000) {  // subnormal in f16: adding 0.5 makes the float unit round it
    return {uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}

template <class T>
MOEC_INLINE float rounded(float x) { return value(narrow<T>(x)); }

// --- loads and stores; `_n` forms touch the first n elements only and fill with zeros ------------------------
template <class V, class T>
MOEC_INLINE V raw(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// 16-bit words into 32-bit lanes. The builtins are single instructions that GCC does not find by itself.
MOEC_INLINE vu widen(vh h) {
#if MOEC_LANES == 8 && defined(__AVX2__)
  typedef int16_t half8 __attribute__((vector_size(16)));
  return (vu)__builtin_ia32_pmovzxwd256((half8)h);
#elif MOEC_LANES == 16 && defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)h);
#else
  return __builtin_convertvector(h, vu);
#endif
}

MOEC_INLINE vf load(const float* p) { return raw<vf>(p); }
MOEC_INLINE vf load(const bf16* p) { return (vf)(widen(raw<vh>(p)) << 16); }
MOEC_INLINE vf load(const f16* p) {
#if MOEC_LANES == 8 && defined(__F16C__)
  typedef int16_t half8 __attribute__((vector_size(16)));
  return (vf)__builtin_ia32_vcvtph2ps256(raw<half8>(p));
#elif MOEC_LANES == 16 && defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(raw<__m256i>(p));
#else
  const vu h = widen(raw<vh>(p)), rest = h & 0x7fff;
  const vu finite = (vu)((vf)(rest << 13) * 0x1p112f), special = 0x7f800000u | (rest & 0x3ff) << 13;
  return (vf)((h & 0x8000) << 16 | (rest >= 0x7c00 ? special : finite));
#endif
}
template <class T>
MOEC_COLD vf load_n(const T* p, int64_t n) {
  T part[L] = {};
  std::memcpy(part, p, size_t(n) * sizeof(T));
  return load(part);
}

MOEC_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
MOEC_INLINE void store(bf16* p, vf v) {
  const vu u = (vu)v, nearest = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vh h = __builtin_convertvector(v != v ? vu{} + 0x7fc0u : nearest, vh);
  std::memcpy(p, &h, sizeof h);
}
MOEC_INLINE void store(f16* p, vf v) {
#if MOEC_LANES == 8 && defined(__F16C__)
  const auto h = __builtin_ia32_vcvtps2ph256(v, 0);
  std::memcpy(p, &h, sizeof h);
#else
  for (int i = 0; i < L; i++) p[i] = narrow<f16>(v[i]);
#endif
}
template <class T>
MOEC_COLD void store_n(T* p, vf v, int64_t n) {
  T part[L];
  store(part, v);
  std::memcpy(p, part, size_t(n) * sizeof(T));
}

// Keeps a loaded vector in its register: GCC would rather load it again for each use, though half of 32 registers are free.
template <class V>
MOEC_INLINE void keep(V& v) {
#if MOEC_LANES == 16 && defined(__AVX512F__)
  asm("" : "+v"(v));
#endif
}

MOEC_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
MOEC_INLINE void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }

// --- shuffles -----------------------------------------------------------------------------------------------
#if defined(__clang__) || __GNUC__ >= 12
template <class V, int... I>
MOEC_INLINE V shuffle(V a, V b, std::integer_sequence<int, I...>) { return __builtin_shufflevector(a, b, I...); }
#else
template <class V, int... I>
MOEC_INLINE V shuffle(V a, V b, std::integer_sequence<int, I...>) { return __builtin_shuffle(a, b, vi{I...}); }
#endif

// Where position `at` of the result comes from in the concatenation of a and b. UNPACK kinds stay within 128 bits, as
// the x86 instructions do; BLOCK kinds move whole 128-bit blocks.
enum Kind {
  UNPACK1_LO, UNPACK1_HI, UNPACK2_LO, UNPACK2_HI, BLOCKS_LO, BLOCKS_HI, BLOCKS_EVEN, BLOCKS_ODD, EVEN, ODD, ZIP_LO, ZIP_HI
};
constexpr int source(Kind kind, int at) {
  const int block = at / 4, q = at % 4, half = L > 4 ? L / 8 : 1;
  switch (kind) {
    case UNPACK1_LO:
    case UNPACK1_HI: return (q & 1) * L + block * 4 + (kind == UNPACK1_HI) * 2 + q / 2;
    case UNPACK2_LO:
    case UNPACK2_HI: return (q / 2) * L + block * 4 + (kind == UNPACK2_HI) * 2 + (q & 1);
    case BLOCKS_LO:
    case BLOCKS_HI:
      return (block >= half) * L + (block % half + (kind == BLOCKS_HI) * half) * 4 + q;
    case BLOCKS_EVEN:
    case BLOCKS_ODD: return (2 * block + (kind == BLOCKS_ODD)) * 4 + q;
    case ZIP_LO:
    case ZIP_HI: return (at & 1) * L + at / 2 + (kind == ZIP_HI) * (L / 2);
    default: return 2 * at + (kind == ODD);
  }
}
template <Kind kind, int... I>
MOEC_INLINE vf pick(vf a, vf b, std::integer_sequence<int, I...>) {
  return shuffle(a, b, std::integer_sequence<int, source(kind, I)...>{});
}
template <Kind kind>
MOEC_INLINE vf pick(vf a, vf b) { return pick<kind>(a, b, std::make_integer_sequence<int, L>{}); }

// Transposes the L x L matrix whose rows are r[0..L).
MOEC_INLINE void transpose(vf (&r)[L]) {
  vf t[L], u[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; i += 2) {
    t[i] = pick<UNPACK1_LO>(r[i], r[i + 1]);
    t[i + 1] = pick<UNPACK1_HI>(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; i += 4) {
    u[i] = pick<UNPACK2_LO>(t[i], t[i + 2]);
    u[i + 1] = pick<UNPACK2_HI>(t[i], t[i + 2]);
    u[i + 2] = pick<UNPACK2_LO>(t[i + 1], t[i + 3]);
    u[i + 3] = pick<UNPACK2_HI>(t[i + 1], t[i + 3]);
  }
  if constexpr (L == 4) {
    for (int i = 0; i < L; i++) r[i] = u[i];
  } else if constexpr (L == 8) {
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
      r[i] = pick<BLOCKS_LO>(u[i], u[4 + i]);
      r[4 + i] = pick<BLOCKS_HI>(u[i], u[4 + i]);
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
      const vf lo = pick<BLOCKS_LO>(u[i], u[4 + i]), hi = pick<BLOCKS_HI>(u[i], u[4 + i]);
      const vf lo2 = pick<BLOCKS_LO>(u[8 + i], u[12 + i]), hi2 = pick<BLOCKS_HI>(u[8 + i], u[12 + i]);
      r[i] = pick<BLOCKS_EVEN>(lo, lo2);
      r[4 + i] = pick<BLOCKS_ODD>(lo, lo2);
      r[8 + i] = pick<BLOCKS_EVEN>(hi, hi2);
      r[12 + i] = pick<BLOCKS_ODD>(hi, hi2);
    }
  }
}

// Column i of the L x L matrix whose rows begin at p[0..L) into r[i]. Eight lanes are loaded by halves, so that a third
// of the shuffles is spared.
MOEC_INLINE void load_transposed(const void* const (&p)[L], vf (&r)[L]) {
#if MOEC_LANES == 8 && (defined(__clang__) || __GNUC__ >= 12)
  vf t[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; i++) {
    const char* const from = static_cast<const char*>(p[i % 4]) + i / 4 * 16;
    const char* const below = static_cast<const char*>(p[i % 4 + L / 2]) + i / 4 * 16;
    t[i] = __builtin_shufflevector(raw<v4>(from), raw<v4>(below), 0, 1, 2, 3, 4, 5, 6, 7);
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; i += 4) {
    const vf lo = pick<UNPACK1_LO>(t[i], t[i + 1]), hi = pick<UNPACK1_HI>(t[i], t[i + 1]);
    const vf lo2 = pick<UNPACK1_LO>(t[i + 2], t[i + 3]), hi2 = pick<UNPACK1_HI>(t[i + 2], t[i + 3]);
    r[i] = pick<UNPACK2_LO>(lo, lo2);
    r[i + 1] = pick<UNPACK2_HI>(lo, lo2);
    r[i + 2] = pick<UNPACK2_LO>(hi, hi2);
    r[i + 3] = pick<UNPACK2_HI>(hi, hi2);
  }
#else
#pragma GCC unroll 16
  for (int i = 0; i < L; i++) r[i] = raw<vf>(static_cast<const float*>(p[i]));
  transpose(r);
#endif
}

// The first n numbers at p; the others are zero.
template <class T>
MOEC_INLINE vf some(const T* p, int64_t n) { return n == L ? load(p) : load_n(p, n); }
template <class T>
MOEC_INLINE void store_some(T* p, vf v, int64_t n) {
  if (n == L) store(p, v);
  else store_n(p, v, n);
}

// n numbers that alternate between a and b, apart and together.
template <class T>
MOEC_INLINE void split(const T* p, int64_t n, vf& va, vf& vb) {
  const vf lo = n >= L ? load(p) : load_n(p, n), hi = n == 2 * L ? load(p + L) : load_n(p + L, n > L ? n - L : 0);
  va = pick<EVEN>(lo, hi);
  vb = pick<ODD>(lo, hi);
}
template <class T>
MOEC_INLINE void join(T* p, vf va, vf vb, int64_t n) {
  store_some(p, pick<ZIP_LO>(va, vb), n < L ? n : L);
  if (n > L) store_some(p + L, pick<ZIP_HI>(va, vb), n - L);
}

// The sums of four vectors, as four floats.
MOEC_INLINE v4 sums(vf a, vf b, vf c, vf d) {
  const vf ab = pick<UNPACK1_LO>(a, b) + pick<UNPACK1_HI>(a, b);
  const vf cd = pick<UNPACK1_LO>(c, d) + pick<UNPACK1_HI>(c, d);
  const vf all = pick<UNPACK2_LO>(ab, cd) + pick<UNPACK2_HI>(ab, cd);
  v4 part[L / 4];
  std::memcpy(part, &all, sizeof all);
  v4 sum = part[0];
  for (int i = 1; i < L / 4; i++) sum += part[i];
  return sum;
}

// --- pairs of bf16: acc + a.lo*b.lo + a.hi*b.hi in each 32-bit lane ------------------------------------------
MOEC_INLINE vf dot_pairs(vf acc, vu a, vu b) {
#if defined(__AVX512BF16__) && MOEC_LANES == 16
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  acc += (vf)(a << 16) * (vf)(b << 16);
  return acc + (vf)(a & 0xffff0000u) * (vf)(b & 0xffff0000u);
#endif
}

}  // namespace moec
