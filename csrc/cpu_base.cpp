// The CPU kernels for any processor.
#include "cpu_adamw.h"
#include "cpu_score.h"

namespace safeopt {
const CpuKernels cpu_base = {"base",    adamw_blocks, accumulate_values,
                             histogram, select_above, select_ties};
}
