// What memory allows a step that trains a random share of the weights: the time to add one array to
// another (the gradient to the weight) at the chosen places alone, whose list is at hand, and, for
// comparison, everywhere. No moments, no mask, no arithmetic to speak of.
//
//   g++ -O3 -march=native -pthread -o build/sparse_lines benchmarks/sparse_lines.cpp
//   build/sparse_lines 2 0.01          threads, share of the weights
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

constexpr int64_t kWeights = int64_t(1) << 26;  // 256 MB each: more than the caches hold
constexpr int kAhead = 32;                      // elements between a prefetch and its use

template <class Work>
double nanoseconds_per_weight(int threads, Work work) {
  double best = 1e9;
  for (int round = 0; round < 7; ++round) {
    auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> running;
    for (int t = 0; t < threads; ++t) running.emplace_back(work, t);
    for (std::thread& thread : running) thread.join();
    std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count() / kWeights);
  }
  return best;
}

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "usage: %s THREADS SHARE\n", argv[0]), 2;
  const int threads = std::atoi(argv[1]);
  const double share = std::atof(argv[2]);
  std::vector<float> p(kWeights, 1), g(kWeights, 1);
  std::vector<int64_t> places;
  uint64_t state = 1;
  for (int64_t i = 0; i < kWeights; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    if (double(state >> 40) < share * (1 << 24)) places.push_back(i);
  }
  const int64_t n = int64_t(places.size());
  auto some = [&](bool prefetch) {
    return nanoseconds_per_weight(threads, [&, prefetch](int t) {
      for (int64_t j = n * t / threads, end = n * (t + 1) / threads; j < end; ++j) {
        if (prefetch && j + kAhead < n) {
          __builtin_prefetch(&p[places[j + kAhead]], 1);
          __builtin_prefetch(&g[places[j + kAhead]], 0);
        }
        p[places[j]] += g[places[j]];
      }
    });
  };
  double all = nanoseconds_per_weight(threads, [&](int t) {
    for (int64_t i = kWeights * t / threads, end = kWeights * (t + 1) / threads; i < end; ++i)
      p[i] += g[i];
  });
  std::printf("%d threads, %.3g of the weights: %.3f ns per weight, with prefetch %.3f; all %.3f\n",
              threads, share, some(false), some(true), all);
}
