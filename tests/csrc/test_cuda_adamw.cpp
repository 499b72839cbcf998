// The CUDA kernels of the AdamW step, run on the host: every live element is stepped once with its
// own state, and nothing else is touched, for random masks, types, sizes and places in memory.
#include "cuda_host.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "../../csrc/cuda_adamw.h"

using namespace safeopt;
using Bytes = std::vector<unsigned char>;

std::mt19937 random_bits(0);

int64_t below(int64_t n) { return int64_t(random_bits() % uint64_t(n)); }

template <class T>
void put(void* at, double value) {
  T x = narrow<T>(typename Math<T>::type(value));
  std::memcpy(at, &x, sizeof(T));
}

void put(Dtype type, void* at, double value) {
  switch (type) {
    case Dtype::f64:
      return put<double>(at, value);
    case Dtype::f32:
      return put<float>(at, value);
    case Dtype::bf16:
      return put<bf16>(at, value);
    case Dtype::f16:
      return put<f16>(at, value);
  }
}

template <class F>
F get(Dtype type, const void* base, int64_t i) {
  switch (type) {
    case Dtype::f64:
      return F(static_cast<const double*>(base)[i]);
    case Dtype::f32:
      return static_cast<const float*>(base)[i];
    case Dtype::bf16:
      return widen(static_cast<const bf16*>(base)[i]);
    default:
      return widen(static_cast<const f16*>(base)[i]);
  }
}

template <class T>
constexpr Dtype dtype();
template <>
constexpr Dtype dtype<double>() {
  return Dtype::f64;
}
template <>
constexpr Dtype dtype<float>() {
  return Dtype::f32;
}
template <>
constexpr Dtype dtype<bf16>() {
  return Dtype::bf16;
}
template <>
constexpr Dtype dtype<f16>() {
  return Dtype::f16;
}

// Some numbers, at a place that may be odd for a pack; to its end and not beyond is allowed memory.
struct Numbers {
  Numbers(Dtype type, int64_t n, bool positive, bool odd)
      : size(bytes_of(type)), shift(odd * size) {
    bytes.resize(n * size + shift);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < n; ++i) {
      double x = normal(random_bits);
      put(type, bytes.data() + shift + i * size, positive ? x * x : x);
    }
  }
  void* data() { return bytes.data() + shift; }
  int size, shift;
  Bytes bytes;
};

// A mask with blocks of every kind: runs that are dense, sparse, wholly live or wholly frozen.
Bytes random_mask(int64_t nbits) {
  Bytes bits((nbits + 7) / 8);
  const double densities[] = {0, 0.01, 0.3, 0.5, 0.9, 0.99, 1, 1};
  for (int64_t i = 0; i < nbits;) {
    double density = densities[below(8)];
    for (int64_t end = std::min(nbits, i + 1 + below(4000)); i < end; ++i)
      if (double(random_bits()) < density * 4294967296.0) bits[i >> 3] |= 1 << (i & 7);
  }
  return bits;
}

template <class P, class S>
struct Case {
  using F = typename Math<P>::type;

  Case(bool amsgrad, Pull pull) {
    const int64_t sizes[] = {0, 1, 7, 31, 1023, 1024, 1025, 5000, 33 * 1024 + 5, 70000};
    t = {};
    t.numel = sizes[below(10)];
    Rule& r = t.rule;
    r.span = below(2) ? 1 : 1 + below(3000);
    r.nbits = below(2) ? std::max<int64_t>(1, t.numel + below(50)) : 1 + below(2000);
    r.offset = below(2) ? 0 : below(r.span * r.nbits + 3);
    r.live_bit = below(2);
    bits = random_mask(r.nbits);
    r.bits = bits.data();
    for (int64_t i = 0; i < t.numel; ++i) {
      if (i % kBlock == 0) starts.push_back(t.states);
      t.states += live(r, i);
    }
    starts.push_back(t.states);
    t.starts = starts.data();
    const Dtype narrow_types[] = {Dtype::f32, Dtype::bf16, Dtype::f16};
    t.p_type = dtype<P>();
    t.state_type = dtype<S>();
    t.g_type = below(2) ? t.p_type : narrow_types[below(3)];
    t.anchor_type = below(2) ? t.p_type : narrow_types[below(3)];
    t.pull = pull;
    auto column = [&](Dtype type, int64_t n, bool positive) {
      memory.emplace_back(type, n, positive, below(8) == 0);
      return memory.back().data();
    };
    memory.reserve(7);
    t.p = column(t.p_type, t.numel, false);
    t.g = column(t.g_type, t.numel, false);
    t.m = column(t.state_type, t.states, false);
    t.v = column(t.state_type, t.states, true);
    if (amsgrad) t.v_max = column(t.state_type, t.states, true);
    if (pull != Pull::none) t.anchor = column(t.anchor_type, t.numel, false);
    if (pull != Pull::none && below(2))
      t.share = static_cast<float*>(column(Dtype::f32, t.numel, true));
    t.step =
        step_of<double>(double(1 + below(20)), 0.01, 0.85, 0.95, 0.13, 1e-6, below(2), 8, 2, pull);
    after = memory;
  }

  // The same on `after`, by the definition of the bit rule.
  void expect() {
    const Step<F> s = narrowed<F>(t.step);
    auto* p = reinterpret_cast<P*>(after[0].data());
    S *m = reinterpret_cast<S*>(after[2].data()), *v = reinterpret_cast<S*>(after[3].data());
    S* v_max = t.v_max ? reinterpret_cast<S*>(after[4].data()) : nullptr;
    for (int64_t i = 0, rank = 0; i < t.numel; ++i) {
      if (!live(t.rule, i)) continue;
      F x = widen(p[i]), first = widen(m[rank]), second = widen(v[rank]);
      F top = v_max ? F(widen(v_max[rank])) : F(0), g = get<F>(t.g_type, t.g, i);
      F anchor = t.anchor ? get<F>(t.anchor_type, t.anchor, i) : F(0);
      F share = t.share ? t.share[i] : F(1);
      auto step = [&](auto amsgrad) {
        if (t.pull == Pull::none)
          adamw<amsgrad, Pull::none>(x, g, first, second, top, anchor, share, s);
        else if (t.pull == Pull::coupled)
          adamw<amsgrad, Pull::coupled>(x, g, first, second, top, anchor, share, s);
        else
          adamw<amsgrad, Pull::decoupled>(x, g, first, second, top, anchor, share, s);
      };
      v_max ? step(std::true_type()) : step(std::false_type());
      p[i] = narrow<P>(x);
      m[rank] = narrow<S>(first);
      v[rank] = narrow<S>(second);
      if (v_max) v_max[rank] = narrow<S>(top);
      ++rank;
    }
  }

  bool as_expected() const {
    for (size_t k = 0; k < memory.size(); ++k)
      if (memory[k].bytes != after[k].bytes) return false;
    return true;
  }

  AdamwTensor t;
  Bytes bits;
  std::vector<int64_t> starts;
  std::vector<Numbers> memory, after;
};

template <class P, class S, bool EXTRA>
void check(bool amsgrad, Pull pull, int repeats) {
  for (int turn = 0; turn < repeats; ++turn) {
    Batch batch = {};
    std::vector<Case<P, S>> cases;
    std::vector<Step<double>> steps(kTensors);
    for (batch.count = 0; batch.count < 1 + turn % 4; ++batch.count)
      cases.emplace_back(amsgrad, pull);
    for (int k = 0; k < batch.count; ++k) {
      batch.tensors[k] = cases[k].t;
      steps[k] = cases[k].t.step;
      batch.first_group[k + 1] =
          batch.first_group[k] + (cases[k].t.numel + kBlock * kGroup - 1) / (kBlock * kGroup);
    }
    if (turn % 2) batch.steps = steps.data();
    float found = turn % 8 == 7;
    batch.found_inf = {turn % 4 == 3 ? &found : nullptr, 0, false};
    if (!found)
      for (auto& one : cases) one.expect();
    host::launch(adamw_kernel<P, S, EXTRA>, batch.first_group[batch.count], kThreads, batch);
    REQUIRE(!trapped);
    for (const auto& one : cases) REQUIRE(one.as_expected());
  }
}

template <class P, class S>
void check_all() {
  check<P, S, false>(false, Pull::none, 16);
  check<P, S, true>(true, Pull::none, 8);
  for (Pull pull : {Pull::coupled, Pull::decoupled})
    for (bool amsgrad : {false, true}) check<P, S, true>(amsgrad, pull, 4);
}

// A directory of another mask must not lead to another tensor's memory.
void check_directories() {
  for (int turn = 0; turn < 40; ++turn) {
    Case<float, float> one(false, Pull::none);
    if (one.starts.size() < 2) continue;
    Batch batch = {};
    batch.count = 1;
    batch.first_group[1] = (one.t.numel + kBlock * kGroup - 1) / (kBlock * kGroup);
    int64_t block = below(int64_t(one.starts.size()) - 1);
    const bool all = below(2) && one.t.states > 0;
    if (all) {
      for (int64_t& start : one.starts) ++start;
    } else {
      one.starts[block + 1] += below(2) ? 2000 : -1;
    }
    batch.tensors[0] = one.t;
    batch.tensors[0].starts = one.starts.data();
    host::launch(adamw_kernel<float, float, false>, batch.first_group[1], kThreads, batch);
    REQUIRE(trapped || (!all && one.starts[block] == one.starts[block + 1]));
  }
}

void check_steps() {
  float single = 6, found = 0, rate = 0.5f;
  double wide = 2;
  std::vector<Step<double>> steps(3);
  StepInputs in = {{{&single, 0, false}, {&wide, 0, true}, {nullptr, 9, false}},
                   {Pull::none, Pull::coupled, Pull::decoupled},
                   3,
                   {&rate, 0, false},
                   {nullptr, 4, false},
                   {&found, 0, false},
                   0.85,
                   0.95,
                   0.13,
                   1e-6,
                   2,
                   true,
                   steps.data()};
  host::launch(step_kernel, 1, kLanes, in);
  REQUIRE(single == 7 && wide == 3);
  const double counts[] = {7, 3, 9};
  for (int k = 0; k < 3; ++k) {
    auto expected =
        step_of<double>(counts[k], 0.5, 0.85, 0.95, 0.13, 1e-6, true, 4, 2, in.pulls[k]);
    REQUIRE(std::memcmp(&steps[k], &expected, sizeof(expected)) == 0);
  }
  found = 1;
  host::launch(step_kernel, 1, kLanes, in);
  REQUIRE(single == 7 && wide == 3);
}

int main() {
  check_steps();
  check_directories();
  check_all<float, float>();
  check_all<double, double>();
  check_all<bf16, bf16>();
  check_all<f16, f16>();
  check_all<bf16, float>();
  check_all<f16, float>();
  std::puts("ok");
}
