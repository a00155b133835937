// Owns: the second form of a function that takes its arguments out of an array of 8-byte slots, so that a recorded
// step can call it without Python (recorder.py writes the slots, replay.cpp walks them).
// Does not know: any op.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

namespace servd {

// A slot's first bytes are the argument: this library runs on little-endian machines alone.
template <class T>
inline T from_slot(int64_t slot) {
    T value;
    memcpy(&value, &slot, sizeof(T));
    return value;
}

template <class... Args, size_t... Index>
inline int call_slots(int (*function)(Args...), const int64_t* slots, std::index_sequence<Index...>) {
    return function(from_slot<Args>(slots[Index])...);
}

template <class... Args>
inline int call_slots(int (*function)(Args...), const int64_t* slots) {
    return call_slots(function, slots, std::index_sequence_for<Args...>{});
}

}  // namespace servd

// After SERVD_EXPORT(name)(...) { ... }: the function may be part of a recorded step.
#define SERVD_RECORDABLE(name)                                                       \
    SERVD_EXPORT(name##_slots)(const int64_t* slots) {                               \
        return servd::call_slots(&SERVD_JOIN(servd_, SERVD_ISA, name), slots);       \
    }
