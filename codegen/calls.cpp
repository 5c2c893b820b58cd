// Calls that were made before, made again without Python: the words of each kept by what the call is given.
//
// What `moec::moe` and `moec::experts` hand to a kernel is worked out in Python (moec/runtime/cpu.py) at a layer's first
// call of a size. All of it but the addresses of x and of the results follows from what is in the key: the op's texts,
// how tensors lie, where parameters are, how many threads there are. So a call that is like one before is looked up here,
// given its addresses and run; one that is not goes to Python's op, which says what to keep of it (`moec_remember`).
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <shared_mutex>
#include <string_view>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <vector>

#define MOEC_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using at::Tensor;
using at::TensorList;
using Words = std::vector<int64_t>;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

enum Op : int64_t { MOE, EXPERTS };

// ---- memory that kernels work in: one growing block a thread, for Python's calls too

constexpr size_t PAGE = 4096;

struct Workspace {
  void* base = nullptr;
  size_t size = 0;

  void release() {
    std::free(base);
    base = nullptr, size = 0;
  }

  // At least `wanted` bytes; null where there is no such memory.
  void* of(size_t wanted) {
    if (wanted <= size && base) return base;
    release();  // before the new one is taken
    if (posix_memalign(&base, PAGE, std::max<size_t>(wanted, 1)) != 0) return base = nullptr;
    size = wanted;
    return base;
  }

  ~Workspace() { release(); }
};

thread_local Workspace workspace;

// ---- what is kept

// In the order of `About` in moec/runtime/calls.py.
struct About {
  int64_t workspace;                             // bytes
  int64_t work, x, y, experts, weights, logits;  // places of addresses among the words
  int64_t y_dtype, weights_dtype, logits_dtype;  // 0 fp32, 1 bf16, 2 fp16
  int64_t wide, E;                               // columns of y, of logits
};

struct Made {
  void (*kernel)(const void*);
  Words words;
  About about;
};

struct Hash {
  size_t operator()(const Words& key) const {
    uint64_t h = 0x9e3779b97f4a7c15u;
    for (const int64_t word : key) h = (h ^ static_cast<uint64_t>(word)) * 0xff51afd7ed558ccdu, h ^= h >> 32;
    return h;
  }
};

struct Table {
  std::shared_mutex mutex;  // not held while a kernel runs: on many threads there may always be one that does
  std::unordered_map<Words, std::shared_ptr<const Made>, Hash> made;
};

Table& table() {
  static Table* kept = new Table;  // never destroyed: threads may outlive static objects
  return *kept;
}

// The key of the call that Python is making on this thread for want of a known one; null: none.
thread_local const Words* unknown = nullptr;

struct Unknown {
  const Words key;
  const Words* outer;
  explicit Unknown(const Words& k) : key(k), outer(unknown) { unknown = &key; }
  ~Unknown() { unknown = outer; }
};

// ---- keys

int64_t address(const Tensor& t) { return reinterpret_cast<int64_t>(t.const_data_ptr()); }

struct Key {
  Words& words;

  Key(Op op, int64_t k) : words(room()) {
    words.clear();
    words.insert(words.end(), {op, k, at::get_num_threads()});
  }

  static Words& room() {
    thread_local Words words;
    return words;
  }

  void text(std::string_view s) {
    words.push_back(static_cast<int64_t>(s.size()));
    const size_t begin = words.size();
    words.resize(begin + (s.size() + 7) / 8, 0);
    std::memcpy(words.data() + begin, s.data(), s.size());
  }

  void lies(const Tensor& t) {
    words.push_back(static_cast<int64_t>(t.scalar_type()) << 8 | t.dim());
    words.insert(words.end(), t.sizes().begin(), t.sizes().end());
    words.insert(words.end(), t.strides().begin(), t.strides().end());
  }

  void all(TensorList tensors) {
    words.push_back(static_cast<int64_t>(tensors.size()));
    for (const Tensor& t : tensors) {
      words.push_back(address(t));
      lies(t);
    }
  }

  // Parameters; also which numbers they hold, where a copy of them is read.
  void all(TensorList params, std::string_view engine) {
    all(params);
    if (engine.find("weights=") == engine.npos) return;
    for (const Tensor& t : params) {
      words.push_back(reinterpret_cast<int64_t>(t.storage().unsafeGetStorageImpl()));
      words.push_back(t.is_inference() ? 0 : static_cast<int64_t>(t._version()));
    }
  }
};

// ---- calls

Tensor empty(int64_t rows, int64_t columns, at::ScalarType dtype) {
  return at::detail::empty_cpu({rows, columns}, dtype);
}

at::ScalarType dtype_of(int64_t code) {
  return code == 0 ? at::kFloat : code == 1 ? at::kBFloat16 : at::kHalf;
}

// A known call's own copy of its words.
Words& words_of(const Made& made, void* work, const Tensor& x, const Tensor& y, const Tensor& experts,
                const Tensor& weights) {
  thread_local Words words;
  words = made.words;
  words[made.about.work] = reinterpret_cast<int64_t>(work);
  words[made.about.x] = address(x);
  words[made.about.y] = address(y);
  words[made.about.experts] = address(experts);
  words[made.about.weights] = address(weights);
  return words;
}

std::shared_ptr<const Made> kept(const Words& key) {
  std::shared_lock held(table().mutex);
  const auto found = table().made.find(key);
  return found == table().made.end() ? nullptr : found->second;
}

// `run` of the call that `key` tells, in a workspace of its size; nothing where it is not known.
template <class Run>
auto known(const Words& key, const Run& run) -> std::optional<decltype(run(std::declval<const Made&>(), nullptr))> {
  const std::shared_ptr<const Made> made = kept(key);
  void* work = made ? workspace.of(static_cast<size_t>(made->about.workspace)) : nullptr;
  if (!work) return std::nullopt;  // Python makes the call, or says what memory is missing
  return run(*made, work);
}

template <class Signature>
auto python_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Results moe(const Tensor& x, TensorList router, TensorList params, int64_t k, std::string_view spec,
            std::string_view engine) {
  Key key(MOE, k);
  key.text(spec);
  key.text(engine);
  key.lies(x);
  key.all(router);
  key.all(params, engine);
  auto found = known(key.words, [&](const Made& made, void* work) -> Results {
    const About& is = made.about;
    const int64_t tokens = x.size(0);
    Tensor y = empty(tokens, is.wide, dtype_of(is.y_dtype)), logits = empty(tokens, is.E, dtype_of(is.logits_dtype)),
           weights = empty(tokens, k, dtype_of(is.weights_dtype)), experts = empty(tokens, k, at::kLong);
    Words& words = words_of(made, work, x, y, experts, weights);
    words[is.logits] = address(logits);
    made.kernel(words.data());
    return {y, logits, weights, experts};
  });
  if (found) return *std::move(found);
  static const auto python = python_op<decltype(moe)>("moec::moe_anew");
  Unknown call(key.words);
  return python.call(x, router, params, k, spec, engine);
}

Tensor experts(const Tensor& x, const Tensor& weights, const Tensor& experts, TensorList params, std::string_view spec,
               std::string_view engine) {
  Key key(EXPERTS, 0);
  key.text(spec);
  key.text(engine);
  key.lies(x);
  key.lies(weights);
  key.lies(experts);
  key.all(params, engine);
  auto found = known(key.words, [&](const Made& made, void* work) {
    Tensor y = empty(x.size(0), made.about.wide, dtype_of(made.about.y_dtype));
    made.kernel(words_of(made, work, x, y, experts, weights).data());
    return y;
  });
  if (found) return *std::move(found);
  static const auto python = python_op<decltype(::experts)>("moec::experts_anew");
  Unknown call(key.words);
  return python.call(x, weights, experts, params, spec, engine);
}

template <auto* function>
void serve(const char* name) {
  new c10::RegistrationHandleRAII(c10::Dispatcher::singleton().registerImpl(
      {name, ""}, c10::DispatchKey::CPU, c10::KernelFunction::makeFromUnboxedRuntimeFunction(function), {}, nullptr,
      "moec"));  // as long as the process
}

}  // namespace

// From now on calls on a CPU come here first.
MOEC_EXPORT void moec_serve() {
  serve<&moe>("moec::moe");
  serve<&experts>("moec::experts");
}

// Keep the call that is being made on this thread, if it came here first; whether it did.
MOEC_EXPORT int64_t moec_remember(void (*kernel)(const void*), const int64_t* words, int64_t count, const About* about) {
  if (!unknown) return 0;
  auto made = std::make_shared<const Made>(Made{kernel, Words(words, words + count), *about});
  std::unique_lock held(table().mutex);
  table().made.insert_or_assign(*unknown, std::move(made));
  return 1;
}

// Let go of all that is kept; when this returns, no call uses it.
MOEC_EXPORT void moec_forget() {
  decltype(Table::made) gone;
  {
    std::unique_lock held(table().mutex);
    gone.swap(table().made);
  }
  for (const auto& [key, made] : gone) {
    while (made.use_count() > 1) std::this_thread::yield();
  }
  std::atomic_thread_fence(std::memory_order_acquire);  // what those calls read was read before
}

// This thread's workspace of at least `size` bytes, aligned to pages; null where there is no such memory.
MOEC_EXPORT void* moec_workspace(int64_t size) { return workspace.of(static_cast<size_t>(size)); }

MOEC_EXPORT int64_t moec_workspace_bytes() { return static_cast<int64_t>(workspace.size); }

MOEC_EXPORT void moec_release_workspace() { workspace.release(); }
