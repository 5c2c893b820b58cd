// moec: router{compute=bf16; renormalize=True; weight_dtype=bf16} experts{dtype=bf16} -> bf16
// avx2: 8 lanes
#define MOEC_LANES 8
#define MOEC_TILE_ROWS 6
#define MOEC_TILE_VECTORS 2
#define MOEC_DOT_ROWS 3
#include "moe.hpp"

namespace {
using namespace moec;

struct Kernel {
  using Op = Fma<bf16>;
  using Param = bf16;
  using Y = bf16;
  using Bias = bf16;
  static constexpr Gate gate = Gate::concat;
  static constexpr Layout layout_in = Layout::nk, layout_out = Layout::nk;
  static constexpr bool bias_in = false, bias_out = false;
  static constexpr bool weight_on_input = false, out = true;
  static MOEC_INLINE vf phi(vf a, vf b) {
    return mul(silu(a), b);
  }
};

struct Router {
  using Weight = bf16;
  using Compute = bf16;
  using ScoreType = float;
  static constexpr bool softmax = true;
  static constexpr bool maps_logits = false, maps_score = false;
  static constexpr int64_t groups = 1, topk_group = 1;
  static constexpr GroupScore group_score = GroupScore::top2_sum;
  static constexpr float masked_value = -__builtin_inff();
  static constexpr bool sorted = true, weight_from_choice = false;
  static constexpr bool choose_by_logits = false;
  static constexpr bool softmax_over_k = false, renormalize = true;
  static constexpr float eps = 0.0f, clamp_min = 0.0f, scale = 1.0f;
};

}  // namespace

#define MOEC_EXPORT extern "C" __attribute__((visibility("default")))
MOEC_EXPORT int64_t args_words() { return sizeof(Args) / 8; }
MOEC_EXPORT void moe(const Args* args) { run<Kernel, Router>(*args); }
MOEC_EXPORT void experts(const Args* args) { run<Kernel, void>(*args); }
