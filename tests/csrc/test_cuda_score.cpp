// The CUDA kernels of scoring, run on the host, against plain loops.
#include "cuda_host.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "../../csrc/cuda_score.h"

using namespace safeopt;

std::mt19937 random_bits(0);

int64_t below(int64_t n) { return int64_t(random_bits() % uint64_t(n)); }

template <class G, int V>
void check_accumulate() {
  for (int64_t n : {1, 3, 4, 7, 1000, 4096, 4097, 70001}) {
    const int64_t odd = V == 1;
    std::vector<float> total(n + odd), expected;
    std::vector<G> gradient(n + odd);
    for (float& x : total) x = float(below(1000)) / 7;
    for (G& g : gradient) g = narrow<G>(typename Math<G>::type(below(1000)) / 3 - 100);
    bool absolute = below(2), spoil = below(2);
    if (spoil) gradient[odd + below(n)] = narrow<G>(typename Math<G>::type(INFINITY));
    expected = total;
    for (int64_t i = odd; i < n + odd; ++i)
      absolute ? accumulate<true>(expected[i], gradient[i])
               : accumulate<false>(expected[i], gradient[i]);
    int32_t bad = 0;
    int64_t tile = kThreads * kTurns, blocks = std::max<int64_t>(1, (n / V + tile - 1) / tile);
    host::launch(accumulate_kernel<G, V>, blocks, kThreads, total.data() + odd,
                 static_cast<const G*>(gradient.data() + odd), n, &bad, absolute);
    REQUIRE(bad == spoil);
    REQUIRE(std::memcmp(total.data(), expected.data(), total.size() * sizeof(float)) == 0);
  }
}

// Many ties, from the smallest key to the largest, and some negative zeros.
std::vector<int32_t> random_keys(int64_t n) {
  const int32_t values[] = {0, int32_t(0x80000000), 1, 0x3f800000, 0x3f800001, kLargest};
  std::vector<int32_t> keys(n);
  for (int32_t& key : keys)
    key = below(3) ? values[below(6)] : int32_t(below(int64_t(kLargest) + 1));
  return keys;
}

void check_histogram(int64_t n, int64_t blocks) {
  const int shifts[][2] = {{20, 11}, {9, 11}, {0, 9}, {0, 1}, {30, 1}, {3, 4}};
  auto keys = random_keys(n);
  for (auto [shift, width] : shifts) {
    bool reverse = below(2);
    int above = shift + width;
    int32_t some = key_at(keys[below(n)], reverse), prefix = above == kKeyBits ? 3 : some >> above;
    std::vector<unsigned long long> counts(size_t(1) << width, 5), expected = counts;
    for (int32_t bits : keys) {
      int64_t key = reverse ? kLargest - (bits & 0x7fffffff) : bits & 0x7fffffff;
      if (above == kKeyBits || key >> above == prefix) ++expected[(key >> shift) % (1 << width)];
    }
    host::launch(histogram_kernel, blocks, kThreads, counts.data(),
                 static_cast<const int32_t*>(keys.data()), n, shift, width, prefix, reverse);
    REQUIRE(counts == expected);
  }
}

void check_select(int64_t n, int64_t allowed, int32_t threshold, bool reverse) {
  auto keys = random_keys(n);
  std::vector<uint8_t> bits((n + 7) / 8 + 1, 0xa5), expected(bits.size(), 0);
  expected[0] = 0xa5;  // the bits begin at an odd place
  int64_t ties = allowed, left = allowed;
  for (int64_t i = 0; i < n; ++i) {
    int32_t key = reverse ? kLargest - (keys[i] & 0x7fffffff) : keys[i] & 0x7fffffff;
    bool taken = key > threshold || (key == threshold && left > 0);
    if (key == threshold && left > 0) --left;
    expected[1 + i / 8] |= taken << i % 8;
  }
  const int64_t chunks = (n + kChunk - 1) / kChunk, blocks = (chunks + kWarps - 1) / kWarps;
  std::vector<int32_t> tied(chunks, -77);
  const int32_t* from = keys.data();
  host::launch(count_ties_kernel, blocks, kThreads, tied.data(), static_cast<const int64_t*>(&ties),
               from, n, threshold, reverse);
  host::launch(share_kernel, 1, kSharing, tied.data(), chunks, &ties);
  host::launch(select_kernel, blocks, kThreads, bits.data() + 1,
               static_cast<const int32_t*>(tied.data()), from, n, threshold, reverse);
  REQUIRE(bits == expected);
  REQUIRE(ties == left);
}

// More chunks than threads that share them.
void check_share(int64_t chunks, int64_t allowed) {
  std::vector<int32_t> tied(chunks), expected(chunks);
  for (int32_t& count : tied) count = below(2) ? 0 : int32_t(below(kChunk + 1));
  int64_t ties = allowed, left = allowed;
  for (int64_t k = 0; k < chunks; ++k) {
    expected[k] = int32_t(std::min<int64_t>(left, tied[k]));
    left -= expected[k];
  }
  host::launch(share_kernel, 1, kSharing, tied.data(), chunks, &ties);
  REQUIRE(tied == expected && ties == left);
}

int main() {
  check_accumulate<float, 4>();
  check_accumulate<float, 1>();
  check_accumulate<double, 4>();
  check_accumulate<bf16, 4>();
  check_accumulate<bf16, 1>();
  check_accumulate<f16, 4>();
  check_histogram(1, 1);
  check_histogram(12345, 3);
  for (int64_t n : {1, 31, 33, 1000, 8192, 8193, 30001})
    for (int64_t allowed : {int64_t(0), int64_t(1), n / 20, n, 3 * n})
      for (bool reverse : {false, true}) {
        check_select(n, allowed, 0x3f800000, reverse);
        check_select(n, allowed, reverse ? kLargest : 0, reverse);
      }
  for (int64_t allowed : {0, 1, 5000000, 1 << 30}) check_share(3000, allowed);
  std::puts("ok");
}
