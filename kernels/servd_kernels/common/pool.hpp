// Owns: the way a kernel spreads fixed work units over the library's threads.
// Does not know: what a unit computes, or any instruction set.
#pragma once
#include <cstdint>

namespace servd {

using UnitFn = void (*)(void* context, int64_t unit);

// Runs fn(context, u) once for every u in [0, units); returns when all are done. Which thread runs a unit
// is not fixed, so a unit must compute the same bits wherever it runs. Safe to call from several threads:
// while the pool is taken, another caller does its own units alone.
void parallel_for(int64_t units, UnitFn fn, void* context);

// The number of threads parallel_for may use, the caller included.
int num_threads();

}  // namespace servd
