// From one token's logits to its experts and weights: scores, choice, top-k exactly as torch.topk, weights.
#pragma once
#include <algorithm>
#include <type_traits>

#include "args.hpp"
#include "pointwise.hpp"

namespace moec {

enum class GroupScore { top2_sum, max };

using Scored = std::pair<float, int64_t>;

// NaN is greater than every number.
MOEC_INLINE bool better(const Scored& x, const Scored& y) {
  return ((x.first != x.first) && !(y.first != y.first)) || x.first > y.first;
}

// The same algorithms of the standard library as torch.topk on a CPU, hence the same choice among equals.
inline void top_k(Scored* queue, int64_t n, int64_t k, bool sorted) {
  if (k * 64 <= n) {
    std::partial_sort(queue, queue + k, queue + n, better);
    return;
  }
  std::nth_element(queue, queue + k - 1, queue + n, better);
  if (sorted) std::sort(queue, queue + k - 1, better);
}

// x[n] → f(x[n]), `f` being of vectors.
template <class F>
MOEC_INLINE void map(float* x, int64_t n, F f) {
  for (int64_t i = 0; i < n; i += L) {
    const int64_t part = n - i < L ? n - i : L;
    store_n(x + i, f(load_n(x + i, part)), part);
  }
}

template <class T>
MOEC_INLINE void round_all(float* x, int64_t n) {
  if constexpr (sizeof(T) == 2)
    for (int64_t i = 0; i < n; i++) x[i] = rounded<T>(x[i]);
}

inline void softmax(float* x, int64_t n) {
  float top = x[0], sum = 0;
  for (int64_t i = 1; i < n; i++) top = x[i] > top || x[i] != x[i] ? x[i] : top;
  for (int64_t i = 0; i < n; i += L) {
    const int64_t part = n - i < L ? n - i : L;
    store_n(x + i, exp(load_n(x + i, part) - top), part);
  }
  for (int64_t i = 0; i < n; i++) sum += x[i];
  for (int64_t i = 0; i < n; i++) x[i] /= sum;
}

// x[E]: logits in, scores out, these as numbers of R::ScoreType.
template <class R>
void scores(float* x, int64_t E) {
  if constexpr (R::softmax) {
    if constexpr (R::maps_logits) map(x, E, [](vf logits) { return R::softmax_of(logits); });
    softmax(x, E);
  }
  if constexpr (R::maps_score) map(x, E, [](vf given) { return R::score(given); });
  round_all<typename R::ScoreType>(x, E);
}

// Leaves choice[E] as it is in the best R::topk_group groups and overwrites it elsewhere.
template <class R, class C>
void keep_best_groups(float* choice, int64_t E, Scored* queue) {
  const int64_t size = E / R::groups;
  for (int64_t g = 0; g < R::groups; g++) {
    const float* c = choice + g * size;
    Scored first{c[0], 0}, second{-__builtin_inff(), 0};
    for (int64_t i = 1; i < size; i++) {
      const Scored next{c[i], i};
      if (better(next, first)) second = first, first = next;
      else if (i == 1 || better(next, second)) second = next;
    }
    const float sum = size > 1 ? rounded<C>(first.first + second.first) : first.first;
    queue[g] = {R::group_score == GroupScore::top2_sum ? sum : first.first, g};
  }
  top_k(queue, R::groups, R::topk_group, false);
  for (int64_t i = R::topk_group; i < R::groups; i++) {
    float* c = choice + queue[i].second * size;
    for (int64_t j = 0; j < size; j++) c[j] = R::masked_value;
  }
}

template <class R, class C>
void choose(const Args& a, float* choice, Scored* queue) {
  if constexpr (R::groups > 1) keep_best_groups<R, C>(choice, a.E, queue);
  for (int64_t e = 0; e < a.E; e++) queue[e] = {choice[e], e};
  top_k(queue, a.E, a.k, R::sorted);
}

// w[k] of R::weight_from → the token's routing weights.
template <class R, class C>
void weights(float* w, int64_t k) {
  if constexpr (R::softmax_over_k) {
    softmax(w, k);
    round_all<C>(w, k);
  }
  if constexpr (R::renormalize) {
    float sum = 0;
    for (int64_t i = 0; i < k; i++) sum += w[i];
    sum = rounded<C>(sum);
    if (R::eps != 0) sum = rounded<C>(sum + R::eps);
    if (R::clamp_min != 0) sum = sum < R::clamp_min ? R::clamp_min : sum;
    for (int64_t i = 0; i < k; i++) w[i] = rounded<C>(w[i] / sum);
  }
  if constexpr (R::scale != 1) {
    for (int64_t i = 0; i < k; i++) w[i] = rounded<C>(w[i] * R::scale);
  }
}

// Token t of the call, whose logits are row[E] (overwritten): experts and weights of the token, also as w[k] floats.
// scratch: E floats and E entries of a queue.
template <class R>
void route(const Args& a, int64_t t, float* row, float* w, float* choice, Scored* queue) {
  using S = typename R::ScoreType;
  using C = std::conditional_t<R::choose_by_logits, typename R::Compute, S>;
  if constexpr (R::choose_by_logits) std::copy(row, row + a.E, choice);
  scores<R>(row, a.E);
  // A selection bias of a wider type makes the choice wider too.
  const bool wide = a.selection_bias.base && a.selection_bias.dtype == F32;
  for (int64_t e = 0; e < a.E; e++) {
    if constexpr (!R::choose_by_logits) choice[e] = row[e];
    if (a.selection_bias.base) choice[e] += read(a.selection_bias.base, a.selection_bias.dtype, e);
  }
  if (!wide) round_all<C>(choice, a.E);
  if (wide) choose<R, float>(a, choice, queue);
  else choose<R, C>(a, choice, queue);
  const float* from = R::weight_from_choice ? choice : row;
  for (int64_t s = 0; s < a.k; s++) w[s] = from[queue[s].second];
  if (wide && R::weight_from_choice) weights<R, float>(w, a.k);
  else weights<R, std::conditional_t<R::weight_from_choice, C, S>>(w, a.k);
  for (int64_t s = 0; s < a.k; s++) {
    a.experts[t * a.k + s] = queue[s].second;
    write(a.weights, a.weights_dtype, t * a.k + s, w[s]);
    w[s] = read(a.weights, a.weights_dtype, t * a.k + s);
  }
}

}  // namespace moec
