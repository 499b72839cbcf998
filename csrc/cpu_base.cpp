// The CPU kernels for any processor.
#include "cpu_adamw.h"

namespace safeopt {
const CpuKernels cpu_base = {"base", adamw_blocks};
}
