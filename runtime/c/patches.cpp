#include "patches.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "error.h"

namespace qsm::host {

namespace {

const double kPi = std::acos(-1.0);

int64_t floor_to(int64_t value, int64_t step) { return value / step * step; }  // value >= 0
int64_t ceil_to(int64_t value, int64_t step) { return floor_to(value + step - 1, step); }

// A patch's weight before normalisation, positive, falling towards its neighbours.
std::vector<double> profile(int64_t size, qsm_blend blend, int64_t overlap, bool first, bool last) {
    std::vector<double> weights(static_cast<size_t>(size));
    const auto n = static_cast<double>(size);
    for (int64_t i = 0; i < size; ++i) {
        const double position = double(i) + 0.5;
        double depth = n;
        if (!first) depth = std::min(depth, position);
        if (!last) depth = std::min(depth, n - position);
        if (blend == QSM_BLEND_GAUSSIAN) {
            const double sigmas = (position - n / 2) / (n / 8);
            depth = std::exp(-0.5 * (sigmas * sigmas));
        } else if (blend == QSM_BLEND_HANN) {
            const double share = depth / double(std::max<int64_t>(overlap, 1));
            const double sine = std::sin(kPi / 2 * std::min(std::max(share, 0.0), 1.0));
            depth = sine * sine;
        }
        weights[size_t(i)] = depth;
    }
    return weights;
}

// Normalises the windows of patches that start at `steps` so that they sum to one at each of
// `extent` voxels; with crop, all weight goes to the largest, the first of equals.
void normalise(std::vector<std::vector<double>> &windows, const std::vector<int64_t> &steps,
               int64_t extent, bool crop) {
    for (int64_t at = 0; at < extent; ++at) {
        double sum = 0;
        double *largest = nullptr;
        const auto each = [&](auto &&body) {
            for (size_t n = 0; n < windows.size(); ++n) {
                const int64_t i = at - steps[n];
                if (i >= 0 && i < int64_t(windows[n].size())) body(windows[n][size_t(i)]);
            }
        };
        each([&](double &weight) {
            sum += weight;
            if (!largest || weight > *largest) largest = &weight;
        });
        each([&](double &weight) { weight = crop ? double(&weight == largest) : weight / sum; });
    }
}

// Covers `box` of an axis with evenly spread patches on the divisor's grid; `patch` of 0 takes one.
Axis cover(int32_t length, int64_t divisor, Side box, int64_t patch, int64_t overlap,
           qsm_blend blend, const std::string &front) {
    const int64_t missing = ceil_to(length, divisor) - length;
    const int64_t low = front == "none" ? 0 : (missing + (front == "ceil")) / 2;
    const int64_t first = floor_to(box.start + low, divisor);
    const int64_t extent = ceil_to(box.stop + low - first, divisor);
    const int64_t size = patch ? std::min(patch, extent) : extent;
    const int64_t stride = floor_to(size - overlap, divisor);
    const int64_t gaps = size == extent ? 0 : (extent - size + stride - 1) / stride;
    Axis axis{length, int32_t(size), {}, {}};
    std::vector<int64_t> steps;
    std::vector<std::vector<double>> windows;
    for (int64_t n = 0; n <= gaps; ++n) {
        steps.push_back(floor_to((extent - size) * n / std::max<int64_t>(gaps, 1), divisor));
        axis.starts.push_back(int32_t(steps.back() + first - low));
        windows.push_back(profile(size, blend, overlap, n == 0, n == gaps));
    }
    normalise(windows, steps, extent, blend == QSM_BLEND_CROP);
    for (const auto &window : windows) axis.windows.emplace_back(window.begin(), window.end());
    return axis;
}

// Covers an axis with tiles of which the middle is kept, the last flush with the end if it may be.
Axis tile(int32_t length, int64_t size, int64_t kept, int64_t stride, bool flush) {
    const int64_t count = 1 + (std::max<int64_t>(0, length - kept) + stride - 1) / stride;
    const int64_t margin = (size - kept) / 2, end = std::max<int64_t>(length, kept);
    std::vector<size_t> starts;
    std::vector<int32_t> covered(static_cast<size_t>(end + stride));
    for (int64_t n = 0; n < count; ++n) {
        starts.push_back(size_t(flush ? std::min(n * stride, end - kept) : n * stride));
        for (size_t i = 0; i < size_t(kept); ++i) ++covered[starts.back() + i];
    }
    Axis axis{length, int32_t(size), {}, {}};
    for (const size_t start : starts) {
        std::vector<float> window(static_cast<size_t>(size));
        for (size_t i = 0; i < size_t(kept); ++i) {
            window[size_t(margin) + i] = 1 / float(covered[start + i]);
        }
        axis.starts.push_back(int32_t(start) - int32_t(margin));
        axis.windows.push_back(std::move(window));
    }
    return axis;
}

}  // namespace

int64_t PatchPlan::count() const {
    int64_t count = 1;
    for (const Axis &axis : axes) count *= int64_t(axis.starts.size());
    return count;
}

Patch PatchPlan::patch(int64_t index) const {
    Patch patch{};
    patch.box.channels = 1;
    for (size_t n = 3; n-- > 0;) {
        const Axis &axis = axes[n];
        const auto at = size_t(index) % axis.starts.size();
        index /= int64_t(axis.starts.size());
        patch.box.volume[n] = axis.length;
        patch.box.start[n] = axis.starts[at];
        patch.box.size[n] = axis.size;
        patch.at[n] = int32_t(at);
        patch.windows[n] = axis.windows[at].data();
    }
    return patch;
}

Box bounding_box(const std::vector<uint8_t> &mask, const Shape &shape) {
    Box box;
    for (size_t axis = 0; axis < 3; ++axis) box[axis] = {shape[axis], 0};
    const auto grow = [&](size_t axis, int32_t at) {
        box[axis].start = std::min(box[axis].start, at);
        box[axis].stop = std::max(box[axis].stop, at + 1);
    };
    const uint8_t *voxel = mask.data();
    for (int32_t x = 0; x < shape[0]; ++x) {
        for (int32_t y = 0; y < shape[1]; ++y) {
            for (int32_t z = 0; z < shape[2]; ++z) {
                if (*voxel++) grow(0, x), grow(1, y), grow(2, z);
            }
        }
    }
    return box;
}

bool touches(const qsm_cuda_patch &box, const std::vector<uint8_t> &mask) {
    Side inside[3];
    for (int axis = 0; axis < 3; ++axis) {
        inside[axis] = {std::max(box.start[axis], 0),
                        std::min(box.start[axis] + box.size[axis], box.volume[axis])};
    }
    for (int32_t x = inside[0].start; x < inside[0].stop; ++x) {
        for (int32_t y = inside[1].start; y < inside[1].stop; ++y) {
            const size_t row =
                (size_t(x) * size_t(box.volume[1]) + size_t(y)) * size_t(box.volume[2]);
            for (int32_t z = inside[2].start; z < inside[2].stop; ++z) {
                if (mask[row + size_t(z)]) return true;
            }
        }
    }
    return false;
}

PatchPlan plan_whole(const Shape &shape, int32_t divisor, const std::string &front) {
    PatchPlan plan{{}, true, 0, QSM_BLEND_CROP};
    for (size_t n = 0; n < 3; ++n) {
        plan.axes[n] = cover(shape[n], divisor, {0, shape[n]}, 0, 0, QSM_BLEND_CROP, front);
    }
    return plan;
}

PatchPlan plan_patches(const Box &mask_box, const Shape &shape, int32_t divisor, int32_t patch,
                       int32_t overlap, qsm_blend blend, const std::string &front) {
    if (patch % divisor || patch <= 0) {
        throw Error(QSM_USAGE_ERROR,
                    text("patch %d is not a multiple of the network's divisor %d", patch, divisor));
    }
    if (overlap < 0 || overlap > patch - divisor) {
        throw Error(QSM_USAGE_ERROR,
                    text("overlap %d must lie between 0 and patch - divisor = %d; set a larger "
                         "patch or a smaller overlap",
                         overlap, patch - divisor));
    }
    PatchPlan plan{{}, false, overlap, blend};
    const int32_t margin = overlap / 2 + overlap % 2;
    for (size_t n = 0; n < 3; ++n) {
        const Side grown{std::max<int32_t>(0, mask_box[n].start - margin),
                         int32_t(std::min<int64_t>(shape[n], int64_t{mask_box[n].stop} + margin))};
        plan.axes[n] = cover(shape[n], divisor, grown, patch, overlap, blend, front);
    }
    return plan;
}

PatchPlan plan_tiles(const Shape &shape, const Tiles &tiles) {
    PatchPlan plan{{}, false, 0, QSM_BLEND_CROP};
    for (size_t n = 0; n < 3; ++n) {
        const int64_t kept = tiles.kept[n], stride = tiles.stride[n];
        plan.axes[n] = tile(shape[n], tiles.size[n], kept, stride, tiles.blend == "mean");
        plan.overlap = std::max(plan.overlap, int32_t(kept - stride));
    }
    return plan;
}

}  // namespace qsm::host
