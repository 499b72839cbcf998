// The CPU kernels for x86-64 with AVX512. The headers of the system come before the pragma: an
// inline function of theirs compiled for avx512 could be the copy that the linker keeps for all.
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef SAFEOPT_X86
#include <immintrin.h>
#define SAFEOPT_AVX512  // g++ defines no __AVX512F__ for a pragma
// Of its own headers: they leave lanes unset on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,lzcnt,popcnt,f16c,prefer-vector-width=512")
#include "cpu_adamw.h"
#include "cpu_score.h"

namespace safeopt {
const CpuKernels cpu_avx512 = {"avx512",  adamw_blocks, accumulate_values,
                               histogram, select_above, select_ties};
}
#endif
