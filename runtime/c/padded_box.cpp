#include "padded_box.h"

#include <algorithm>
#include <cmath>

#include "fft.h"

namespace qsm::host {

namespace {

constexpr double kSupportMm = 5;      // sources farther outside the mask than this are none
constexpr int32_t kBeyondVoxels = 4;  // a side, between the support and its periodic neighbour
constexpr double kSlack = 1e-6;       // of a length: headers state voxel sizes in single precision

struct Run {
    ptrdiff_t start;
    size_t length;
};

// The rows of a ball around a voxel, as steps from it.
std::vector<Run> ball_of(const double (&mm)[3], ptrdiff_t row, ptrdiff_t plane) {
    const double radius = kSupportMm * (1 + kSlack), squared = radius * radius;
    const auto reach = [&](double left, int axis) {
        return int32_t(std::sqrt(std::max(left, 0.0)) / mm[axis]);
    };
    std::vector<Run> ball;
    const int32_t most = reach(squared, 0);
    for (int32_t x = -most; x <= most; ++x) {
        const double left = squared - x * x * mm[0] * mm[0];
        const int32_t wide = reach(left, 1);
        for (int32_t y = -wide; y <= wide; ++y) {
            const int32_t z = reach(left - y * y * mm[1] * mm[1], 2);
            ball.push_back({x * plane + y * row - z, 2 * size_t(z) + 1});
        }
    }
    return ball;
}

}  // namespace

PaddedBox::PaddedBox(const Scan &scan)
    : scan(scan), box(bounding_box(scan.mask, scan.geometry.shape)), geometry(scan.geometry) {
    for (size_t axis = 0; axis < 3; ++axis) {
        const double support = kSupportMm / geometry.voxel_size_mm[axis];
        pads[axis] = int32_t(std::ceil(support - kSlack)) + kBeyondVoxels;
        geometry.shape[axis] = fast_length(box[axis].stop - box[axis].start + 2 * pads[axis]);
    }
}

std::vector<uint8_t> PaddedBox::places(size_t row) const {
    const size_t plane = row * size_t(geometry.shape[1]);
    std::vector<uint8_t> places(plane * size_t(geometry.shape[0]), kBeyond);
    over_mask(row, [&](size_t, size_t padded) { places[padded] = kMeasured; });
    const std::vector<Run> ball = ball_of(geometry.voxel_size_mm, ptrdiff_t(row), ptrdiff_t(plane));
    over_mask(row, [&](size_t, size_t padded) {
        const uint8_t *here = &places[padded];
        const auto inside = [&](size_t step) {
            return here[step] == kMeasured && *(here - step) == kMeasured;
        };
        if (inside(1) && inside(row) && inside(plane)) return;  // none is nearest to it
        for (const Run &run : ball) {
            uint8_t *from = &places[size_t(ptrdiff_t(padded) + run.start)];
            for (size_t n = 0; n < run.length; ++n) from[n] = std::min<uint8_t>(from[n], kSupport);
        }
    });
    return places;
}

}  // namespace qsm::host
