// Owns: running a recorded step: its calls, one after the other, with the arguments that they had.
// Does not know: any op; each call is a function over slots (recordable.hpp).
#include <cstdint>

// The program is, for each call: the function's address, the number of its slots, the slots.
// Returns the index of the first call that reported a fault, where it stops; -1 if none did.
extern "C" __attribute__((visibility("default"))) int64_t servd_replay(const int64_t* program, int64_t calls) {
    for (int64_t call = 0; call < calls; ++call) {
        auto function = reinterpret_cast<int (*)(const int64_t*)>(program[0]);
        if (function(program + 2) != 0) return call;
        program += 2 + program[1];
    }
    return -1;
}
