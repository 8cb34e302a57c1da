// Overlapped patches whose windows sum to one; see runtime/patches.py, which this follows.
#ifndef QSM_RUNTIME_PATCHES_H
#define QSM_RUNTIME_PATCHES_H

#include <array>
#include <cstdint>
#include <vector>

#include "card.h"
#include "patch_rows.h"
#include "qsm_runtime.h"
#include "scan.h"

namespace qsm::host {

// The patches along one axis: where they start, possibly before the volume, and their windows.
struct Axis {
    int32_t length;  // voxels of the volume
    int32_t size;    // of every patch
    std::vector<int32_t> starts;
    std::vector<std::vector<float>> windows;  // (patches, size)
};

struct Patch {
    qsm_cuda_patch box;       // of one channel
    const float *windows[3];  // box.size weights each, owned by the plan
    int32_t at[3];            // which of the windows of its axis each one is
};

struct PatchPlan {
    std::array<Axis, 3> axes;
    bool whole;
    int32_t overlap;
    qsm_blend blend;

    Shape patch_shape() const { return {axes[0].size, axes[1].size, axes[2].size}; }
    int64_t count() const;
    Patch patch(int64_t index) const;  // z fastest
};

// A range of voxels along an axis.
struct Side {
    int32_t start, stop;
};
using Box = std::array<Side, 3>;

// The smallest box that holds a mask, which is not empty.
Box bounding_box(const std::vector<uint8_t> &mask, const Shape &shape);

// Whether a patch touches the mask.
bool touches(const qsm_cuda_patch &box, const std::vector<uint8_t> &mask);

// The whole volume at once, padded to the divisor; `front` is pad_front of a card.
PatchPlan plan_whole(const Shape &shape, int32_t divisor, const std::string &front);

// Patches of `patch` voxels that share `overlap` at least, over a mask's bounding box grown by half
// of that. Throws a usage error if patch, overlap and divisor do not go together.
PatchPlan plan_patches(const Box &mask_box, const Shape &shape, int32_t divisor, int32_t patch,
                       int32_t overlap, qsm_blend blend, const std::string &front);

// Tiles of a card, with zeros beyond the volume; where they overlap, each counts alike.
PatchPlan plan_tiles(const Shape &shape, const Tiles &tiles);

}  // namespace qsm::host

#endif
