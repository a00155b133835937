// Owns: rows sorted by the group (an expert, an adapter) that each belongs to, and the walk over them in blocks.
// Does not know: what a group's rows are multiplied by.
#pragma once
#include <algorithm>

#include "kernel.hpp"

namespace SERVD_ISA {

struct Groups {
    int64_t count;             // groups
    Scratch<int64_t> starts;   // [count + 1]: group g's rows are order[starts[g]..starts[g + 1])
    Scratch<int64_t> order;    // row numbers, ascending within a group; rows of no group are left out

    // ids [rows]: the group of each row; none if outside 0..groups-1.
    Groups(const int32_t* ids, int64_t rows, int64_t groups) : count(groups), starts(groups + 2), order(rows) {
        std::fill(starts.data, starts.data + groups + 2, 0);
        auto has_group = [=](int32_t id) { return id >= 0 && id < groups; };
        for (int64_t row = 0; row < rows; ++row)
            if (has_group(ids[row])) ++starts.data[ids[row] + 2];
        for (int64_t g = 2; g < groups + 2; ++g) starts.data[g] += starts.data[g - 1];
        // starts[g + 1] is now the first place of g; as it fills, it becomes that of g + 1.
        for (int64_t row = 0; row < rows; ++row)
            if (has_group(ids[row])) order.data[starts.data[ids[row] + 1]++] = row;
    }

    int64_t rows() const { return starts.data[count]; }
    int64_t first(int64_t group) const { return starts.data[group]; }
    int64_t size(int64_t group) const { return starts.data[group + 1] - starts.data[group]; }
};

// f(group, panel, first, rows) for each panel of each group and each block of `block` of its rows; `first` counts
// from the group's first row. The blocks that share a panel follow each other.
template <class F>
void for_group_blocks(const Groups& groups, int64_t panels, int64_t block, int64_t work, F f) {
    Scratch<int64_t> firsts(groups.count + 1);  // the first unit of each group
    auto blocks = [&groups, block](int64_t group) { return (groups.size(group) + block - 1) / block; };
    firsts.data[0] = 0;
    for (int64_t g = 0; g < groups.count; ++g) firsts.data[g + 1] = firsts.data[g] + panels * blocks(g);
    parallel(firsts.data[groups.count], work, [&](int64_t unit) {
        const int64_t* end = firsts.data + groups.count + 1;
        int64_t group = std::upper_bound(static_cast<const int64_t*>(firsts.data), end, unit) - firsts.data - 1;
        int64_t inside = unit - firsts.data[group], first = inside % blocks(group) * block;
        f(group, inside / blocks(group), first, lesser(block, groups.size(group) - first));
    });
}

}  // namespace SERVD_ISA
