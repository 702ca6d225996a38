// The row kernels for whatever the compiler targets by default: any x86-64, and ARM.
#include "rows.h"

#define RK_LANES 4
#define RK_F16_INSTRUCTIONS 0
#define RK_TABLE kernels_baseline
#define RK_NAME "baseline"
#include "rows.inl"
