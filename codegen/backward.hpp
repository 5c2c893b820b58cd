// The gradients of the experts in one parallel region: dispatch, activations again (or as saved), slopes, then products
// for the rows of x and for every weight, and sums over slots in a fixed order.
//
// With z = (a, b) the projections of a row, h = φ(z), g the row's gradient and w its routing weight:
//   dh = g·W_out, dz = w·dh·φ'(z), dx = Σ_slots dz·W_in, dW_in = dzᵀ·x, dW_out = gᵀ·(w·h), dw = <dh, h> + <g, b_out>
// since <g, W_out·h> = <g·W_out, h>. Without a second product dh = g. Where the weight is on the input, x stands for w·x and dw = <dz·W_in, x>.
// Experts are taken in groups, which bounds the workspace. A task writes its own outputs, and what is added from group to
// group is added in their order, so that results do not depend on the number of threads.
#pragma once
#include "backward_args.hpp"
#include "moe.hpp"
#include "outer.hpp"

namespace moec {

template <class K>
class Backward {
 public:
  using Op = typename K::Op;
  using A = typename Op::A;  // rows of x, of y's gradient, of h and of slopes: floats, or bf16 that is multiplied in pairs
  using W = typename Op::W;
  using B = typename K::Bias;
  static constexpr bool mixed = K::gate == Gate::interleaved, separate = K::gate == Gate::separate;
  static constexpr bool two = K::gate == Gate::concat || separate;
  static constexpr int64_t views = mixed || two ? 2 : 1;
  static constexpr Layout back_in = K::layout_in == Layout::nk ? Layout::kn : Layout::nk;  // the transposed weights'
  static constexpr Layout back_out = K::layout_out == Layout::nk ? Layout::kn : Layout::nk;

  Backward(const BackwardArgs& args, int64_t& groups, int thread, int threads)
      : a(args), groups(groups), thread(thread), threads(threads), x_rows(args.at<const A*>(args.at_x_rows)),
        g_rows(args.at<const A*>(args.at_g_rows)), h_rows(args.at<const A*>(args.at_h_rows)),
        s_rows(args.at<const A*>(args.at_s_rows)), weight(args.at<float>(args.at_weights)),
        partial(args.at<float>(args.at_partial)), position(args.at<int64_t>(args.at_position)),
        pair(args.at<int64_t>(args.at_pair)), begin(args.at<int64_t>(args.at_begin)), hits(args.at<Hit>(args.at_hits)),
        segments(args.at<Segment>(args.at_segments)), group(args.at<Group>(args.at_groups)),
        scratch(args.work + args.at_thread + thread * args.per_thread),
        want_rows(args.dx || (K::weight_on_input && args.dweights)), want_in(args.da.any() || args.db.any()),
        want_bias_in(args.dbias_a.any() || args.dbias_b.any()),
        want_slopes(want_rows || want_in || want_bias_in),
        want_dh(want_slopes || (args.dweights && !K::weight_on_input)) {}

  void run() {
    const TileState<Op> tiles;
    for (int64_t t : share(a.T)) {
      if (!a.x_direct && !K::weight_on_input) copy_row<W>(a.x, t, a.H, 1.0f, a.at<A>(a.at_x) + t * a.ld_x);
      if (!a.g_direct) copy_row<float>(a.g, t, a.O, 1.0f, a.at<A>(a.at_g) + t * a.ld_g);
    }
    for (int64_t p : share(a.T * a.k)) weight[p] = read(a.weights, a.weights_dtype, p);
    barrier();
    if (thread == 0) dispatch();
    barrier();
    zero_idle();
    for (int64_t i = 0; i < groups; i++) {
      if constexpr (K::weight_on_input) {
        scale_rows(group[i]);
        barrier();
      }
      tasks<0>(group[i]);
      barrier();
      tasks<1>(group[i]);
      barrier();
      combine(i);
    }
  }

 private:
  const BackwardArgs& a;
  int64_t& groups;
  const int thread, threads;
  const A** const x_rows;  // of sorted pairs; of a group's pairs where they are scaled
  const A** const g_rows;  // of sorted pairs
  const A** const h_rows;  // of a group's pairs, as those of slopes
  const A** const s_rows;
  float* const weight;
  float* const partial;     // <dh, h> of sorted pairs by tasks' columns
  int64_t* const position;  // of pair (t, s) in expert order; -1: no such expert
  int64_t* const pair;      // the inverse
  int64_t* const begin;
  Hit* const hits;
  Segment* const segments;
  Group* const group;
  char* const scratch;
  const bool want_rows, want_in, want_bias_in, want_slopes, want_dh;

  Range share(int64_t n) const { return {n * thread / threads, n * (thread + 1) / threads}; }
  void barrier() const {
    if (threads > 1) {
#pragma omp barrier
    }
  }
  const A* row_of(const Matrix& m, bool direct, int64_t at, int64_t ld, int64_t t) const {
    return direct ? reinterpret_cast<const A*>(m.base) + t * m.row : a.at<A>(at) + t * ld;
  }
  // Where b's slopes begin in a row that holds a's first: pairs of bf16 begin at even numbers.
  int64_t second() const { return separate ? a.F + a.F % Op::per : a.F; }
  const A* const* inputs(const Group& g, int64_t row) const {
    return x_rows + (K::weight_on_input ? row - g.row : row);
  }
  static int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

  // Sorts the pairs by expert, makes groups of experts and cuts their work into tasks.
  void dispatch() {
    const int64_t pairs = a.T * a.k;
    std::fill(begin, begin + a.E + 1, 0);
    for (int64_t p = 0; p < pairs; p++)
      if (uint64_t(a.experts[p]) < uint64_t(a.E)) begin[a.experts[p] + 1]++;
    Group* g = new (group) Group{};
    Hit* hit = hits;
    Segment* s = segments;
    for (int64_t e = 0; e < a.E; e++) {
      const int64_t row = begin[e], rows = begin[e + 1];
      begin[e + 1] += row;
      if (!rows) continue;
      if (g->rows && g->rows + rows > a.group) {
        g = new (g + 1) Group{};
        g->hits[0] = hit - hits, g->segments[0] = s - segments, g->row = row;
      }
      cut(*g, hit, s, e, row, rows);
    }
    groups = g - group + 1;
    for (int64_t p = 0; p < pairs; p++) {
      const bool known = uint64_t(a.experts[p]) < uint64_t(a.E);
      const int64_t at = known ? begin[a.experts[p]]++ : -1;
      position[p] = at;
      if (!known) continue;
      pair[at] = p;
      x_rows[at] = K::weight_on_input ? a.at<A>(a.at_x) + at * a.ld_x
                                      : row_of(a.x, a.x_direct, a.at_x, a.ld_x, p / a.k);
      g_rows[at] = row_of(a.g, a.g_direct, a.at_g, a.ld_g, p / a.k);
      h_rows[at] = a.at<A>(a.at_h) + at * a.ld_h;
      s_rows[at] = a.at<A>(a.at_s) + at * a.ld_s;
    }
    for (int64_t e = a.E; e > 0; e--) begin[e] = begin[e - 1];  // back to where experts begin
    begin[0] = 0;
  }

  void cut(Group& g, Hit*& hit, Segment*& s, int64_t e, int64_t row, int64_t rows) {
    const int64_t before = g.hits[1] > g.hits[0] ? hit[-1].end : 0, blocks = parts(rows, a.row_block);
    *hit++ = {e, row, rows, before + products(e)};
    g.hits[1] = hit - hits, g.rows += rows;
    for (int64_t b = 0; b < blocks; b++) {
      const bool first = b == 0 && row == g.row;
      const int64_t r0 = rows * b / blocks, m = rows * (b + 1) / blocks - r0;
      const int64_t end[2] = {first ? 0 : s[-1].end[0], first ? 0 : s[-1].end[1]};
      *s++ = {e, row + r0, m, {end[0] + parts(a.F, a.cols), end[1] + (want_rows ? parts(a.H, a.x_cols) : 0)}};
    }
    g.segments[1] = s - segments;
  }

  // Tasks of the gradients of one expert's parameters: blocks of dW_in, of its second tensor, of dW_out; biases.
  int64_t blocks_in(const Gradient& d, int64_t e) const {
    if (!d.of<W>(e)) return 0;
    const int64_t width = separate ? a.F : views * a.F;
    return K::layout_in == Layout::nk ? blocks(width, a.H) : blocks(a.H, width);
  }
  int64_t blocks_out(int64_t e) const {
    if (!a.dout.of<W>(e)) return 0;
    return K::layout_out == Layout::nk ? blocks(a.O, a.F) : blocks(a.F, a.O);
  }
  int64_t blocks(int64_t m, int64_t n) const { return parts(m, a.outer_m) * parts(n, a.outer_n); }
  int64_t products(int64_t e) const {
    return blocks_in(a.da, e) + blocks_in(a.db, e) + blocks_out(e) + (want_bias_in || a.dbias_out.any() ? 1 : 0);
  }

  void zero_idle() {
    const int64_t width = separate ? a.F : views * a.F;
    for (int64_t e : share(a.E)) {
      if (begin[e + 1] > begin[e]) continue;
      a.da.zero<W>(e, width * a.H), a.db.zero<W>(e, width * a.H), a.dout.zero<W>(e, a.F * a.O);
      a.dbias_a.zero<B>(e, width), a.dbias_b.zero<B>(e, width), a.dbias_out.zero<B>(e, a.O);
    }
  }

  void scale_rows(const Group& g) {
    for (int64_t i : share(g.rows)) {
      const int64_t p = pair[g.row + i];
      copy_row<W>(a.x, p / a.k, a.H, weight[p], a.at<A>(a.at_x) + i * a.ld_x);
    }
  }

  // Phase 0: slopes and h of a segment by columns. Phase 1: gradients of parameters, then gradients of rows.
  template <int phase>
  void tasks(Group& g) {
    if (g.segments[0] == g.segments[1]) return;
    const Hit* hit = hits + g.hits[0];
    const Segment* s = segments + g.segments[0];
    const int64_t first = phase == 0 ? 0 : hits[g.hits[1] - 1].end;
    const int64_t total = first + segments[g.segments[1] - 1].end[phase];
    for (int64_t i = g.next[phase]++; i < total; i = g.next[phase]++) {
      if (i < first) {
        while (i >= hit->end) hit++;
        parameters(g, *hit, i - (hit->end - products(hit->e)));
        continue;
      }
      while (i - first >= s->end[phase]) s++;
      const int64_t width = phase == 0 ? a.F : a.H, n = phase == 0 ? a.cols : a.x_cols;
      const int64_t j = (i - first - (s->end[phase] - parts(width, n))) * n, cols = std::min(n, width - j);
      if constexpr (phase == 0) slopes(g, *s, j, cols);
      else rows(g, *s, j, cols);
    }
  }

  // Columns [j, j + n) of z = (a, b) before biases into ca and cb: as saved, or x·W_in.
  void project(const Group& g, const Segment& s, int64_t j, int64_t n, float* ca, float* cb, int64_t ldc) {
    const Tile t{a.few[0], a.k_few, a.k_many[0], scratch};
    const A* const* const x = inputs(g, s.row);
    const int64_t scale = mixed ? 2 : 1;
    const W* const wa = at<K::layout_in>(a.a, s.e, j * scale);
    const W* const next = at<K::layout_in>(a.a, s.e, (j + n) * scale);
    const W* const wb = two ? at<K::layout_in>(a.b, s.e, j) : nullptr;
    tile<Op, K::layout_in>(t, x, s.rows, a.H, wa, a.a.ld, n * scale, ca, ldc, two ? wb : next);
    if constexpr (two) tile<Op, K::layout_in>(t, x, s.rows, a.H, wb, a.b.ld, n, cb, ldc, next);
  }

  template <Layout layout>
  const W* at(const Experts& w, int64_t e, int64_t j) const {
    return w.of<W>(e) + (layout == Layout::nk ? j * w.ld : j);
  }

  MOEC_INLINE void activations(const Segment& s, int64_t r, int64_t j, int64_t c, int64_t part, const float* pa,
                               const float* pb, vf& va, vf& vb) const {
    if (a.saved) {
      const W* const z = reinterpret_cast<const W*>(a.saved) + pair[s.row + r] * views * a.F + j + c;
      va = some(z, part);
      if constexpr (views == 2) vb = some(z + a.F, part);
    } else if constexpr (mixed) {
      split(pa + 2 * c, 2 * part, va, vb);
      if constexpr (K::bias_in) {
        vf ba, bb;
        split(a.bias_a.template of<B>(s.e) + 2 * (j + c), 2 * part, ba, bb);
        va += ba, vb += bb;
      }
    } else {
      va = some(pa + c, part);
      if constexpr (two) vb = some(pb + c, part);
      if constexpr (K::bias_in) va += some(a.bias_a.template of<B>(s.e) + j + c, part);
      if constexpr (K::bias_in && two) vb += some(a.bias_b.template of<B>(s.e) + j + c, part);
    }
  }

  // Columns [j, j + n) of w·h and of the slopes for the rows of a segment, and their share of <dh, h>.
  void slopes(const Group& g, const Segment& s, int64_t j, int64_t n) {
    const int64_t ldc = (n + L - 1) / L * L, lda = mixed ? 2 * ldc : ldc;
    float* const cd = reinterpret_cast<float*>(scratch + a.at_tile);
    float* const ca = cd + s.rows * ldc;
    float* const cb = ca + s.rows * lda;
    if (!a.saved) project(g, s, j, n, ca, cb, lda);
    if (K::out && want_dh) {
      const Tile t{a.few[1], a.k_few, a.k_many[1], scratch};
      const W* const w = at<back_out>(a.out, s.e, j);
      tile<Op, back_out>(t, g_rows + s.row, s.rows, a.O, w, a.out.ld, n, cd, ldc, at<back_out>(a.out, s.e, j + n));
    }
    for (int64_t r = 0; r < s.rows; r++) {
      const int64_t local = s.row - g.row + r;
      A* const h_row = a.at<A>(a.at_h) + local * a.ld_h + j;
      A* const slope = a.at<A>(a.at_s) + local * a.ld_s;
      const float w = K::weight_on_input ? 1.0f : weight[pair[s.row + r]];
      vf share{};
      for (int64_t c = 0; c < n; c += L) {
        const int64_t part = std::min<int64_t>(L, n - c);
        vf va{}, vb{}, h, da, db;
        activations(s, r, j, c, part, ca + r * lda, cb + r * lda, va, vb);
        K::slopes(va, vb, h, da, db);
        if constexpr (K::out) store_some(h_row + c, w * h, part);
        if (!want_dh) continue;
        vf dh;
        if constexpr (K::out) dh = some(cd + r * ldc + c, part);
        else dh = some(g_rows[s.row + r] + j + c, part);
        share += dh * (part == L ? h : only(h, part));
        da *= w * dh, db *= w * dh;
        if constexpr (mixed) {
          join(slope + 2 * (j + c), da, db, 2 * part);
        } else {
          store_some(slope + j + c, da, part);
          if constexpr (two) store_some(slope + second() + j + c, db, part);
        }
      }
      partial[(s.row + r) * parts(a.F, a.cols) + j / a.cols] = total(share);
      if (a.F % Op::per && j + n == a.F && !mixed) end_pairs(slope);
    }
  }

  // Slopes that are odd in number end with half a pair, which meets no weight: it must not be NaN.
  void end_pairs(A* slope) const {
    if (separate || views == 1) slope[a.F] = {};
    if (separate) slope[second() + a.F] = {};
  }

  // Columns [j, j + n) of slopes·W_in for the rows of a segment.
  void rows(const Group& g, const Segment& s, int64_t j, int64_t n) {
    const Tile t{a.few[2], a.k_few, a.k_many[2], scratch};
    const A* const* const from = s_rows + (s.row - g.row);
    float* const to = a.at<float>(a.at_out) + (s.row - g.row) * a.H + j;
    const W* const w = at<back_in>(a.a, s.e, j);
    const int64_t k = separate ? a.F : views * a.F;
    tile<Op, back_in>(t, from, s.rows, k, w, a.a.ld, n, to, a.H, at<back_in>(a.a, s.e, j + n));
    if constexpr (separate) {
      const A** const others = reinterpret_cast<const A**>(scratch + a.at_rows);
      for (int64_t r = 0; r < s.rows; r++) others[r] = from[r] + second();
      float* const c = reinterpret_cast<float*>(scratch + a.at_tile);
      const int64_t ldc = (n + L - 1) / L * L;
      tile<Op, back_in>(t, others, s.rows, k, at<back_in>(a.b, s.e, j), a.b.ld, n, c, ldc,
                        at<back_in>(a.b, s.e, j + n));
      for (int64_t r = 0; r < s.rows; r++)
        for (int64_t i = 0; i < n; i += L) {
          const int64_t part = std::min<int64_t>(L, n - i);
          store_some(to + r * a.H + i, some(to + r * a.H + i, part) + some(c + r * ldc + i, part), part);
        }
    }
  }

  // Task `i` of the gradients of one expert's parameters.
  void parameters(const Group& g, const Hit& hit, int64_t i) {
    const A* const* const x = inputs(g, hit.row);
    const A* const* const h = h_rows + (hit.row - g.row);
    const A* const* const s = s_rows + (hit.row - g.row);
    const A* const* const grads = g_rows + hit.row;
    const int64_t width = separate ? a.F : views * a.F, in = blocks_in(a.da, hit.e), in_b = blocks_in(a.db, hit.e);
    if (i < in) return product<K::layout_in>(hit, i, s, 0, width, x, a.H, a.da);
    if ((i -= in) < in_b) return product<K::layout_in>(hit, i, s, second(), width, x, a.H, a.db);
    if ((i -= in_b) < blocks_out(hit.e)) return product<K::layout_out>(hit, i, grads, 0, a.O, h, a.F, a.dout);
    sum_rows(a.dbias_a.of<B>(hit.e), s, hit.rows, 0, width, nullptr, nullptr);
    sum_rows(a.dbias_b.of<B>(hit.e), s, hit.rows, second(), width, nullptr, nullptr);
    const int64_t* const pairs = K::weight_on_input ? nullptr : pair + hit.row;
    sum_rows(a.dbias_out.of<B>(hit.e), grads, hit.rows, 0, a.O, pairs, weight);
  }

  // Block `i` of the gradient of a weight that takes `in` numbers to `out`, from gradients of its results and its inputs.
  template <Layout layout>
  void product(const Hit& hit, int64_t i, const A* const* results, int64_t offset, int64_t out, const A* const* from,
               int64_t in, const Gradient& d) {
    constexpr bool nk = layout == Layout::nk;
    const int64_t m = nk ? out : in, n = nk ? in : out, across = parts(n, a.outer_n);
    const int64_t i0 = i / across * a.outer_m, j0 = i % across * a.outer_n;
    const OuterRoom<Op> room{a.outer_m, a.outer_n, a.outer_k, reinterpret_cast<const A**>(scratch + a.at_rows),
                             reinterpret_cast<A*>(scratch), reinterpret_cast<typename Op::Word*>(scratch + a.at_b),
                             reinterpret_cast<float*>(scratch + a.at_c)};
    outer<Op>(room, nk ? results : from, i0 + (nk ? offset : 0), std::min(a.outer_m, m - i0), nk ? from : results,
              j0 + (nk ? 0 : offset), std::min(a.outer_n, n - j0), hit.rows, d.of<W>(hit.e) + i0 * n + j0, n);
  }

  // dx[t] += Σ_s out[position of (t, s)] and the routing weights' gradients, for the slots that are in group i.
  void combine(int64_t i) {
    const Group& g = group[i];
    for (int64_t t : share(a.T)) {
      if (a.dweights)
        for (int64_t p = t * a.k; p < (t + 1) * a.k; p++) {
          if (position[p] < 0 ? i > 0 : !inside(g, position[p])) continue;
          write(a.dweights, a.weights_dtype, p, position[p] < 0 ? 0.0f : weight_gradient(g, t, p));
        }
      if (!a.dx) continue;
      if (a.x.dtype == F32) add_slots<float>(g, t, i == 0, static_cast<float*>(a.dx) + t * a.H, i + 1 == groups);
      else if (a.x.dtype == BF16) add_slots<bf16>(g, t, i == 0, a.at<float>(a.at_sum) + t * a.H, i + 1 == groups);
      else add_slots<f16>(g, t, i == 0, a.at<float>(a.at_sum) + t * a.H, i + 1 == groups);
    }
  }
  static bool inside(const Group& g, int64_t row) { return row >= g.row && row < g.row + g.rows; }

  template <class X>
  void add_slots(const Group& g, int64_t t, bool first, float* sums, bool last) const {
    bool any = first || (last && sizeof(X) == 2);
    for (int64_t p = t * a.k; p < (t + 1) * a.k; p++) any |= inside(g, position[p]);
    if (!any) return;
    const float* const out = a.at<float>(a.at_out) - g.row * a.H;
    for (int64_t j = 0; j < a.H; j += L) {
      const int64_t part = std::min<int64_t>(L, a.H - j);
      vf sum = first ? vf{} : some(sums + j, part);
      for (int64_t p = t * a.k; p < (t + 1) * a.k; p++) {
        if (!inside(g, position[p])) continue;
        const vf v = some(out + position[p] * a.H + j, part);
        sum += K::weight_on_input ? weight[p] * v : v;
      }
      if (last && sizeof(X) == 2) store_some(static_cast<X*>(a.dx) + t * a.H + j, sum, part);
      else store_some(sums + j, sum, part);
    }
  }

  float weight_gradient(const Group& g, int64_t t, int64_t p) {
    const int64_t row = position[p];
    if constexpr (K::weight_on_input) {
      float* const x = reinterpret_cast<float*>(scratch);
      copy_row<float>(a.x, t, a.H, 1.0f, x);
      return dot(a.at<float>(a.at_out) + (row - g.row) * a.H, x, a.H);
    }
    const int64_t count = parts(a.F, a.cols);
    float sum = 0;
    for (int64_t b = 0; b < count; b++) sum += partial[row * count + b];
    if constexpr (K::bias_out) sum += dot(g_rows[row], a.bias_out.template of<B>(a.experts[p]), a.O);
    return sum;
  }
};

template <class K>
void run_backward(const BackwardArgs& a) {
  int64_t groups = 0;
#pragma omp parallel num_threads(int(a.threads))
  Backward<K>(a, groups, omp_get_thread_num(), omp_get_num_threads()).run();
}

}  // namespace moec
