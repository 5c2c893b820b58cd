// The whole layer in one parallel region: router, dispatch, first projections with the activation, down projection,
// combine. Every task writes its own outputs, so results do not depend on the number of threads.
#pragma once
#include <omp.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <type_traits>

#include "codes.hpp"
#include "router.hpp"

namespace moec {

// Reading a row of weights takes as long as multiplying it with about so many rows of x.
constexpr int64_t READ = 12;

enum class Gate { none, concat, interleaved, separate };

// Rows [row, row + rows) of the sorted pairs, all of expert `e`. In either phase its tasks end before number `end`.
struct Segment {
  int64_t e, row, rows, end[2];
};

// A thread's share of work.
struct Range {
  int64_t first, last;
  struct Iterator {
    int64_t i;
    bool operator!=(Iterator o) const { return i != o.i; }
    void operator++() { i++; }
    int64_t operator*() const { return i; }
  };
  Iterator begin() const { return {first}; }
  Iterator end() const { return {last}; }
};

// Segments of experts whose weights lie on one memory node follow one another, so that each node has a queue of tasks.
constexpr int NODES = 8;
struct Shared {
  std::atomic<int64_t> next[2][NODES];
  int64_t end[2][NODES], segments[NODES + 1], rows;
};

MOEC_INLINE int node_here(const Args& a) {
#if defined(__linux__)
  if (a.nodes > 1) {
    const int cpu = sched_getcpu();
    if (cpu >= 0 && cpu < a.cpus) return a.node_of_cpu[cpu];
  }
#endif
  return 0;
}

template <class K>
class Layer {
 public:
  using Op = typename K::Op;
  using A = typename Op::A;
  using W = typename Op::W;
  using P = typename K::Param;  // what x is rounded to
  using B = typename K::Bias;

  Layer(const Args& args, Shared& shared, int thread, int threads)
      : a(args), shared(shared), thread(thread), threads(threads), x_rows(args.at<const A*>(args.at_x_rows)),
        h_rows(args.at<const A*>(args.at_h_rows)), weight(args.at<float>(args.at_weights)),
        position(args.at<int64_t>(args.at_position)), pair(args.at<int64_t>(args.at_pair)),
        segments(args.at<Segment>(args.at_segments)), scratch(args.work + args.at_thread + thread * args.per_thread) {}

  // `Router` void: routing weights and experts are given.
  template <class Router>
  void run() {
    const TileState<Op> tiles;
    for (t0 = 0; t0 < a.T; t0 += a.chunk) {
      tokens = a.T - t0 < a.chunk ? a.T - t0 : a.chunk;
      copy_x<Router>();
      if constexpr (!std::is_void_v<Router>) {
        barrier();
        router<Router>();
      } else {
        for (int64_t p : share(tokens * a.k)) weight[p] = read(a.weights, a.weights_dtype, t0 * a.k + p);
      }
      barrier();
      if (thread == 0) dispatch();
      barrier();
      if constexpr (K::weight_on_input) {
        scale_rows();
        barrier();
      }
      tasks<0>();
      barrier();
      if constexpr (K::out) {
        tasks<1>();
        barrier();
      }
      combine();
      barrier();
    }
  }

 private:
  const Args& a;
  Shared& shared;
  const int thread, threads;
  const A** const x_rows;
  const A** const h_rows;
  float* const weight;
  int64_t* const position;  // of pair (t, s) in expert order; -1: no such expert
  int64_t* const pair;      // the inverse
  Segment* const segments;
  char* const scratch;
  int64_t t0 = 0, tokens = 0;

  Range share(int64_t n) const { return {n * thread / threads, n * (thread + 1) / threads}; }
  void barrier() const {
    if (threads == 1) return;
    const double start = a.waits ? omp_get_wtime() : 0.0;
#pragma omp barrier
    if (a.waits) a.waits[thread] += int64_t((omp_get_wtime() - start) * 1e9);
  }
  const A* x_row(int64_t t) const {
    if (a.x_direct) return reinterpret_cast<const A*>(a.x.base) + (t0 + t) * a.x.row;
    return a.at<A>(a.at_x) + t * a.ld_x;
  }

  template <class Router>
  void copy_x() {
    for (int64_t t : share(tokens)) {
      if (!a.x_direct && !K::weight_on_input) copy_row<P>(a.x, t0 + t, a.H, 1.0f, a.at<A>(a.at_x) + t * a.ld_x);
      if constexpr (!std::is_void_v<Router>) {
        const float** rows = a.at<const float*>(a.at_router_rows);
        if (a.router_direct) {
          rows[t] = reinterpret_cast<const float*>(a.x.base) + (t0 + t) * a.x.row;
        } else if (a.at_router_x == a.at_x) {
          rows[t] = a.at<float>(a.at_x) + t * a.ld_x;
        } else {
          float* to = a.at<float>(a.at_router_x) + t * a.ld_x;
          copy_row<typename Router::Compute>(a.x, t0 + t, a.H, 1.0f, to);
          rows[t] = to;
        }
      }
    }
  }

  template <class Router>
  void router() {
    using W = typename Router::Weight;
    using C = typename Router::Compute;
    float* const logits = a.at<float>(a.at_logits);
    const float* const* rows = a.at<const float*>(a.at_router_rows);
    const int64_t block = tokens < 64 ? tokens : 64, cols = 16, across = (a.E + cols - 1) / cols;
    for (int64_t i : share((tokens + block - 1) / block * across)) {
      const int64_t r = i / across * block, j = i % across * cols;
      const auto* w = reinterpret_cast<const W*>(a.router.base) + j * a.router.row;
      few_nk<Fma<W>>(rows + r, std::min(block, tokens - r), a.H, w, a.router.row, std::min(cols, a.E - j),
                     logits + r * a.E + j, a.E, a.k_few, w + cols * a.router.row, reinterpret_cast<float*>(scratch));
    }
    barrier();
    float* const choice = reinterpret_cast<float*>(scratch);
    Scored* const queue = reinterpret_cast<Scored*>(scratch + (a.E * 4 + 63) / 64 * 64);
    for (int64_t t : share(tokens)) {
      float* row = logits + t * a.E;
      C* out = static_cast<C*>(a.logits) + (t0 + t) * a.E;
      for (int64_t e = 0; e < a.E; e++) {
        if (a.router_bias.base) row[e] += read(a.router_bias.base, a.router_bias.dtype, e);
        out[e] = narrow<C>(row[e]);
        row[e] = value(out[e]);
      }
      route<Router>(a, t0 + t, row, weight + t * a.k, choice, queue);
    }
  }

  // Sorts the pairs by expert and cuts the work of both phases into tasks.
  void dispatch() {
    const int64_t pairs = tokens * a.k;
    const int64_t* const e = a.experts + t0 * a.k;
    int64_t* const begin = a.at<int64_t>(a.at_begin);
    std::fill(begin, begin + a.E + 1, 0);
    for (int64_t p = 0; p < pairs; p++)
      if (uint64_t(e[p]) < uint64_t(a.E)) begin[e[p] + 1]++;
    Segment* s = segments;
    int64_t end[2] = {0, 0};
    for (int64_t i = 0; i < a.E; i++) begin[i + 1] += begin[i];
    shared.rows = begin[a.E];
    for (int node = 0; node < a.nodes; node++) {
      for (int phase : {0, 1}) shared.next[phase][node] = end[phase];
      shared.segments[node] = s - segments;
      for (int64_t i = 0; i < a.E; i++) {
        if (a.nodes > 1 && a.node_of_expert[i] != node) continue;
        const int64_t rows = begin[i + 1] - begin[i], blocks = (rows + a.row_block - 1) / a.row_block;
        for (int64_t b = 0; b < blocks; b++) {
          const int64_t r0 = rows * b / blocks, m = rows * (b + 1) / blocks - r0;
          end[0] += (a.F + columns(0, m) - 1) / columns(0, m);
          end[1] += (a.O + columns(1, m) - 1) / columns(1, m);
          *s++ = {i, begin[i] + r0, m, {end[0], end[1]}};
        }
      }
      for (int phase : {0, 1}) shared.end[phase][node] = end[phase];
    }
    shared.segments[a.nodes] = s - segments;
    for (int64_t p = 0; p < pairs; p++) {
      const bool known = uint64_t(e[p]) < uint64_t(a.E);
      const int64_t at = known ? begin[e[p]]++ : -1;
      position[p] = at;
      if (!known) continue;
      pair[at] = p;
      x_rows[at] = K::weight_on_input ? a.at<A>(a.at_x) + at * a.ld_x : x_row(p / a.k);
      h_rows[at] = a.at<A>(a.at_h) + at * a.ld_h;
    }
  }

  int64_t columns(int phase, int64_t m) const { return m > a.few[phase] ? a.many_cols[phase] : a.few_cols[phase]; }

  void scale_rows() {
    for (int64_t i : share(shared.rows))
      copy_row<P>(a.x, t0 + pair[i] / a.k, a.H, weight[pair[i]], a.at<A>(a.at_x) + i * a.ld_x);
  }

  // Columns [j, j + n) of a segment; `after` is the task whose weights are read next: this one where there is none.
  struct Task {
    const Segment* s;
    int64_t j, n;
  };

  template <int phase>
  Task task(const Segment* s, int64_t i) const {
    while (i >= s->end[phase]) s++;
    const int64_t width = phase == 0 ? a.F : a.O, n = columns(phase, s->rows), count = (width + n - 1) / n;
    const int64_t j = (i - (s->end[phase] - count)) * n;
    return {s, j, std::min(n, width - j)};
  }

  // Tasks are taken in runs: long ones first, so that a thread reads memory in long stretches and what it fetches ahead
  // is what it needs next; single ones last, so that all threads end together. A run is a share of the work that is left:
  // the tasks of experts that many tokens chose are the longer ones.
  // Those of the node that the thread runs on come first.
  template <int phase>
  void tasks() {
    const int here = node_here(a);
    for (int64_t n = 0; n < a.nodes; n++) tasks_of<phase>(int((here + n) % a.nodes));
  }

  template <int phase>
  void tasks_of(int node) {
    std::atomic<int64_t>& next = shared.next[phase][node];
    const int64_t total = shared.end[phase][node];
    const Segment* const stop = segments + shared.segments[node + 1];
    const Segment* s = segments + shared.segments[node];
    for (int64_t i = next; i < total;) {
      while (i >= s->end[phase]) s++;
      const int64_t run = run_from<phase>(s, stop, i);
      if (!next.compare_exchange_weak(i, i + run)) continue;
      Task now = task<phase>(s, i);
      for (int64_t last = i + run - 1; i <= last; i++) {
        const Task after = i < last ? task<phase>(now.s, i + 1) : now;
        if constexpr (phase == 0) project_in(*now.s, now.j, now.n, after);
        else project_out(*now.s, now.j, now.n, after);
        s = now.s, now = after;
      }
      i = next;
    }
  }

  // How many tasks from number i on, which is one of segment s, are a share of the node's work that is left.
  template <int phase>
  int64_t run_from(const Segment* s, const Segment* stop, int64_t i) const {
    const auto cost = [this](const Segment* t) { return columns(phase, t->rows) * (t->rows + READ); };
    int64_t left = 0, at = i;
    for (const Segment* t = s; t < stop; at = t->end[phase], t++) left += (t->end[phase] - at) * cost(t);
    int64_t share = left / (2 * std::max<int64_t>(1, threads / a.nodes));
    at = i;
    for (const Segment* t = s; t < stop && share >= cost(t); t++) {
      const int64_t n = std::min(t->end[phase] - at, share / cost(t));
      at += n, share -= n * cost(t);
      if (at < t->end[phase]) break;
    }
    return std::max<int64_t>(1, at - i);
  }

  // Columns [j, j + n) of h = φ(x·W_a + b_a, x·W_b + b_b) for the rows of a segment.
  void project_in(const Segment& s, int64_t j, int64_t n, const Task& after) {
    constexpr bool mixed = K::gate == Gate::interleaved, two = K::gate == Gate::concat || K::gate == Gate::separate;
    const int64_t ldc = (mixed ? 2 : 1) * ((n + L - 1) / L * L);
    const Tile t{a.few[0], a.k_few, a.k_many[0], scratch};
    float* const ca = reinterpret_cast<float*>(scratch + a.at_tile);
    float* const cb = ca + s.rows * ldc;
    const A* const* const rows = x_rows + s.row;
    const int64_t scale = mixed ? 2 : 1;
    const auto wa = from<K::layout_in>(a.a, a.scale_a, s.e, j * scale);
    const auto next = from<K::layout_in>(a.a, a.scale_a, after.s->e, after.j * scale);
    auto wb = next;
    if constexpr (two) wb = from<K::layout_in>(a.b, a.scale_b, s.e, j, K::gate == Gate::concat ? a.F : 0);
    tile<Op, K::layout_in>(t, rows, s.rows, a.H, wa, a.a.ld, n * scale, ca, ldc, wb);
    if constexpr (two) tile<Op, K::layout_in>(t, rows, s.rows, a.H, wb, a.b.ld, n, cb, ldc, next);
    const B* const bias_a = K::bias_in ? a.bias_a.template of<B>(s.e) + j * scale : nullptr;
    const B* const bias_b = K::bias_in && two ? a.bias_b.template of<B>(s.e) + j : nullptr;
    A* const h = a.at<A>(a.at_h) + s.row * a.ld_h + j;
    float* const out = a.at<float>(a.at_out) + s.row * a.O + j;  // what φ gives where there is no second product
    for (int64_t r = 0; r < s.rows; r++) {
      const float* const pa = ca + r * ldc;
      const float* const pb = cb + r * ldc;
      for (int64_t c = 0; c < n; c += L) {
        const int64_t part = std::min<int64_t>(L, n - c);
        vf va, vb{};
        if constexpr (mixed) {
          split(pa + 2 * c, 2 * part, va, vb);
          if constexpr (K::bias_in) {
            vf ba, bb;
            split(bias_a + 2 * c, 2 * part, ba, bb);
            va += ba, vb += bb;
          }
        } else {
          va = some(pa + c, part);
          if constexpr (two) vb = some(pb + c, part);
          if constexpr (K::bias_in) va += some(bias_a + c, part);
          if constexpr (K::bias_in && two) vb += some(bias_b + c, part);
        }
        if (a.saved) save(s.row + r, j + c, part, va, vb);
        const vf v = K::phi(va, vb);
        if constexpr (K::out) store_some(h + r * a.ld_h + c, v, part);
        else store_some(out + r * a.O + c, v, part);
      }
      if (K::out && sizeof(A) == 2 && j + n == a.F && a.F % 2) h[r * a.ld_h + n] = {};
    }
  }

  // Numbers [j, j + n) of a and b of a sorted pair, kept for backward.
  MOEC_COLD void save(int64_t row, int64_t j, int64_t n, vf va, vf vb) const {
    constexpr int64_t views = K::gate == Gate::none ? 1 : 2;
    P* const to = reinterpret_cast<P*>(a.saved) + (t0 * a.k + pair[row]) * views * a.F + j;
    store_some(to, va, n);
    if constexpr (views == 2) store_some(to + a.F, vb, n);
  }

  void project_out(const Segment& s, int64_t j, int64_t n, const Task& after) {
    const Tile t{a.few[1], a.k_few, a.k_many[1], scratch};
    float* const c = a.at<float>(a.at_out) + s.row * a.O + j;
    const auto w = from<K::layout_out>(a.out, a.scale_out, s.e, j);
    const auto next = from<K::layout_out>(a.out, a.scale_out, after.s->e, after.j);
    tile<Op, K::layout_out>(t, h_rows + s.row, s.rows, a.F, w, a.out.ld, n, c, a.O, next);
  }

  // An expert's weights from output `j` on; `before`: outputs of the matrix that its codes are scaled as before `w`.
  template <Layout layout>
  auto from(const Experts& w, const Experts& scale, int64_t e, int64_t j, int64_t before = 0) const {
    const W* const at = w.of<W>(e) + (layout == Layout::kn ? j : j * w.ld);
    if constexpr (coded<Op>) return Codes<Op>{at, scale.of<float>(e), scale.ld, before + j};
    else return at;
  }

  // y[t] = Σ_s w[t, s] · (out[position of (t, s)] + bias_out), slot by slot.
  void combine() {
    constexpr int64_t width = 512;
    const int64_t across = (a.O + width - 1) / width;
    typename K::Y* const y = static_cast<typename K::Y*>(a.y);
    const float* const out = a.at<float>(a.at_out);
    for (int64_t i : share(tokens * across)) {
      const int64_t t = i / across, j0 = i % across * width, j1 = std::min(a.O, j0 + width);
      for (int64_t j = j0; j < j1; j += L) {
        const int64_t part = std::min<int64_t>(L, j1 - j);
        vf sum{};
        for (int64_t p = t * a.k; p < (t + 1) * a.k; p++) {
          if (position[p] < 0) continue;
          vf v = some(out + position[p] * a.O + j, part);
          if constexpr (K::bias_out) v += some(a.bias_out.template of<B>(a.experts[t0 * a.k + p]) + j, part);
          sum += K::weight_on_input ? v : weight[p] * v;
        }
        typename K::Y* const to = y + (t0 + t) * a.O + j;
        store_some(to, sum, part);
      }
    }
  }
};

template <class K, class Router>
void run(const Args& a) {
  Shared shared{};
#pragma omp parallel num_threads(int(a.threads))
  Layer<K>(a, shared, omp_get_thread_num(), omp_get_num_threads()).template run<Router>();
}

}  // namespace moec
