// The pointwise functions of activations over vectors, each within a few units in the last place.
#pragma once
#include "vec.hpp"

namespace moec {

MOEC_INLINE vf splat(float x) { return x - vf{}; }
MOEC_INLINE vf abs(vf x) { return (vf)((vu)x & 0x7fffffffu); }
MOEC_INLINE vf with_sign(vf magnitude, vf sign) { return (vf)((vu)magnitude | ((vu)sign & 0x80000000u)); }

MOEC_INLINE vf add(vf x, vf y) { return x + y; }
MOEC_INLINE vf sub(vf x, vf y) { return x - y; }
MOEC_INLINE vf mul(vf x, vf y) { return x * y; }
MOEC_INLINE vf div(vf x, vf y) { return x / y; }
MOEC_INLINE vf neg(vf x) { return -x; }
MOEC_INLINE vf ge(vf x, vf y) { return x >= y ? splat(1) : splat(0); }
MOEC_INLINE vf gt(vf x, vf y) { return x > y ? splat(1) : splat(0); }
// NaN wins in all of these, as in torch.
MOEC_INLINE vf maximum(vf x, vf y) { return (x > y) | (x != x) ? x : y; }
MOEC_INLINE vf minimum(vf x, vf y) { return (x < y) | (x != x) ? x : y; }
MOEC_INLINE vf clamp_min(vf x, vf lo) { return x < lo ? lo : x; }
MOEC_INLINE vf clamp_max(vf x, vf hi) { return x > hi ? hi : x; }
MOEC_INLINE vf relu(vf x) { return x < 0.0f ? splat(0) : x; }
template <class T>
MOEC_INLINE vf rounded_lanes(vf x) {
  vf r;
  for (int i = 0; i < L; i++) r[i] = rounded<T>(x[i]);
  return r;
}
MOEC_INLINE vf round_bf16(vf x) { return rounded_lanes<bf16>(x); }
MOEC_INLINE vf round_f16(vf x) { return rounded_lanes<f16>(x); }
MOEC_INLINE vf sqrt(vf x) {
  vf r;
  for (int i = 0; i < L; i++) r[i] = __builtin_sqrtf(x[i]);
  return r;
}

// 2^n·e^r with n = round(x/ln 2) and a polynomial in r; 2^n in two factors so that subnormal results are right.
MOEC_INLINE vf exp(vf x) {
  const vf clamped = x > 89.0f ? splat(89.0f) : x < -104.0f ? splat(-104.0f) : x;
  const vf magic = splat(12582912.0f);
  const vf shifted = clamped * 1.44269504088896341f + magic, n = shifted - magic;
  const vf r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vi power = (vi)shifted - (vi)magic, half = power >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((power - half + 127) << 23);
}

MOEC_INLINE vf log(vf x) {
  const vi tiny = x < 1.17549435e-38f;
  const vf scaled = tiny ? x * 8388608.0f : x;
  const vi bits = (vi)scaled - 0x3f3504f3;  // mantissa into [sqrt(1/2), sqrt(2))
  const vf e = __builtin_convertvector(bits >> 23, vf) - (tiny ? splat(23) : splat(0));
  const vf m = (vf)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f, z = m * m;
  vf p = splat(7.0376836292e-2f);
  p = p * m + -1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m + -1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m + -1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m + -2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const vf y = m + (m * z * p + e * -2.12194440e-4f - 0.5f * z) + e * 0.693359375f;
  const vf zero_or_nan = x == 0.0f ? splat(-__builtin_inff()) : splat(__builtin_nanf(""));
  return (x > 0.0f) & (x < __builtin_inff()) ? y : x == __builtin_inff() ? x : zero_or_nan;
}

MOEC_INLINE vf log1p(vf x) {
  const vf u = x + 1.0f, d = u - 1.0f;  // what was lost in u is put back as a factor
  return d == 0.0f ? x : u == __builtin_inff() ? u : log(u) * (x / d);
}

MOEC_INLINE vf tanh(vf x) {
  const vf a = abs(x), z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  const vf small = p * z * x + x, large = 1.0f - 2.0f / (exp(a + a) + 1.0f);
  return a < 0.625f ? small : with_sign(large, x);
}

MOEC_INLINE vf erf(vf x) {
  const vf t = abs(x), s = x * x;
  vf far = (splat(-1.72853470e-5f) * t + 3.83197126e-4f) * s + (splat(-3.88396438e-3f) * t + 2.42546219e-2f);
  far = far * t + -1.06777877e-1f;
  far = far * t + -6.34846687e-1f;
  far = far * t + -1.28717512e-1f;
  far = far * t - t;
  far = 1.0f - exp(far);
  vf near = splat(-5.96761703e-4f);
  near = near * s + 4.99119423e-3f;
  near = near * s + -2.67681349e-2f;
  near = near * s + 1.12819925e-1f;
  near = near * s + -3.76125336e-1f;
  near = near * s + 1.28379166e-1f;
  near = near * x + x;
  const vf y = t > 0.927734375f ? with_sign(t > 4.0f ? splat(1) : far, x) : near;
  return x != x ? x : y;
}

MOEC_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }
MOEC_INLINE vf silu(vf x) { return x / (1.0f + exp(-x)); }
MOEC_INLINE vf softplus(vf x) { return x > 20.0f ? x : log1p(exp(x)); }
MOEC_INLINE vf gelu(vf x) { return 0.5f * x * (1.0f + erf(x * 0.70710678118654752f)); }
MOEC_INLINE vf gelu_tanh(vf x) {
  return 0.5f * x * (1.0f + tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

}  // namespace moec
