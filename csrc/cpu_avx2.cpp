// The CPU kernels for x86-64 with AVX2. The headers of the system come before the pragma: an
// inline function of theirs compiled for avx2 could be the copy that the linker keeps for all.
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef SAFEOPT_X86
#include <immintrin.h>
#pragma GCC target("avx2,bmi,bmi2,lzcnt,popcnt")
#include "cpu_adamw.h"
#include "cpu_score.h"

namespace safeopt {
const CpuKernels cpu_avx2 = {"avx2",    adamw_blocks, accumulate_values,
                             histogram, select_above, select_ties};
}
#endif
