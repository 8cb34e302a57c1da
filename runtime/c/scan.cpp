#include "scan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "error.h"
#include "k_space.h"

namespace qsm::host {

namespace {

constexpr double kUsualP99Ppm[] = {0.002, 0.3};
constexpr double kLargestP99Ppm = 1;  // local fields of tissue stay below
constexpr double kTotalDeviationPpm[] = {0.002, 3};  // of any part of a head
constexpr int32_t kLongestAxis = 1 << 20;

// Where the caller's memory holds our first voxel, and how far the next along our axes lie.
struct Steps {
    ptrdiff_t first = 0, along[3];
};

Steps steps_of(const Shape &shape, const Layout &layout) {
    const Axes back = layout.axes.inverse();
    Steps steps;
    ptrdiff_t step = 1;
    for (const size_t nth : {0, 1, 2}) {
        const size_t axis = back.order[layout.order == QSM_X_FASTEST ? nth : 2 - nth];
        const bool flipped = layout.axes.flipped[axis];
        steps.along[axis] = flipped ? -step : step;
        if (flipped) steps.first += (shape[axis] - 1) * step;
        step *= shape[axis];
    }
    return steps;
}

// Calls body(here, there) with each voxel's place in our memory and in the caller's.
template <class Body>
void over_voxels(const Shape &shape, const Layout &layout, Body &&body) {
    const Steps steps = steps_of(shape, layout);
    const ptrdiff_t nx = shape[0], ny = shape[1], nz = shape[2];
    const auto [sx, sy, sz] = steps.along;
    // Blocks of a few lines each, so that no order leaves the cache between neighbours.
    constexpr ptrdiff_t kBlock = 16;
    const auto block = [](ptrdiff_t from, ptrdiff_t n) { return std::min(from + kBlock, n); };
    for (ptrdiff_t x0 = 0; x0 < nx; x0 += kBlock) {
        for (ptrdiff_t y0 = 0; y0 < ny; y0 += kBlock) {
            for (ptrdiff_t z0 = 0; z0 < nz; z0 += kBlock) {
                for (ptrdiff_t x = x0; x < block(x0, nx); ++x) {
                    for (ptrdiff_t y = y0; y < block(y0, ny); ++y) {
                        for (ptrdiff_t z = z0; z < block(z0, nz); ++z) {
                            body(size_t((x * ny + y) * nz + z),
                                 size_t(steps.first + x * sx + y * sy + z * sz));
                        }
                    }
                }
            }
        }
    }
}

// numpy's percentile of the absolute values, which `values` becomes.
double percentile_99(Volume values) {
    for (float &value : values) value = std::fabs(value);
    const double rank = 0.99 * double(values.size() - 1);
    const auto below = values.begin() + static_cast<ptrdiff_t>(rank);
    std::nth_element(values.begin(), below, values.end());
    const auto above = std::min_element(below + (below + 1 < values.end() ? 1 : 0), values.end());
    return *below + (rank - std::floor(rank)) * double(*above - *below);
}

Volume values_inside(const Scan &scan) {
    Volume inside;
    inside.reserve(size_t(std::count(scan.mask.begin(), scan.mask.end(), 1)));
    for (size_t n = 0; n < scan.mask.size(); ++n) {
        if (scan.mask[n]) inside.push_back(scan.local_field_ppm[n]);
    }
    return inside;
}

void require_total_ppm(const Scan &scan) {
    const Volume inside = values_inside(scan);
    const double mean =
        std::accumulate(inside.begin(), inside.end(), 0.0) / double(inside.size());
    double squared = 0;
    for (const float value : inside) squared += (value - mean) * (value - mean);
    const double deviation = std::sqrt(squared / double(inside.size()));
    if (deviation >= kTotalDeviationPpm[0] && deviation <= kTotalDeviationPpm[1]) return;
    throw Error(QSM_DATA_ERROR,
                text("the total field varies by %.3g ppm, in a head it is %g to %g: check its unit",
                     deviation, kTotalDeviationPpm[0], kTotalDeviationPpm[1]));
}

void require_ppm(Scan &scan) {
    Volume inside = values_inside(scan);
    if (std::all_of(inside.begin(), inside.end(), [](float v) { return v == 0; })) {
        throw Error(QSM_DATA_ERROR,
                    "the field is zero in the whole mask; check the field and the mask");
    }
    const double p99 = percentile_99(std::move(inside));
    if (p99 > kLargestP99Ppm) {
        throw Error(QSM_DATA_ERROR,
                    text("the field's 99th percentile is %.3g ppm, too much for tissue (below "
                         "%g): looks like Hz; divide by 42.577 MHz/T and the field strength in T",
                         p99, kLargestP99Ppm));
    }
    if (p99 >= kUsualP99Ppm[0] && p99 <= kUsualP99Ppm[1]) return;
    scan.notes.push_back(
        text("the field's 99th percentile is %.2g ppm, usually it lies between %g "
             "and %g: check its unit",
             p99, kUsualP99Ppm[0], kUsualP99Ppm[1]));
}

}  // namespace

Geometry Geometry::padded(int32_t pad_voxels) const {
    Geometry grown = *this;
    for (int32_t &n : grown.shape) n += 2 * pad_voxels;
    return grown;
}

Geometry geometry_from(const qsm_scan &scan, const Axes &axes) {
    if (!scan.local_field_ppm || !scan.mask) {
        throw Error(QSM_USAGE_ERROR,
                    text("scan.%s is a null pointer", scan.mask ? "local_field_ppm" : "mask"));
    }
    Geometry geometry{};
    int64_t voxels = 1;
    for (int axis = 0; axis < 3; ++axis) {
        const int32_t n = scan.shape[axis];
        if (n < 1) {
            throw Error(QSM_DATA_ERROR, text("the shape must be three positive sizes, got %d x %d "
                                             "x %d",
                                             scan.shape[0], scan.shape[1], scan.shape[2]));
        }
        voxels = std::min<int64_t>(voxels * n, int64_t{1} << 31);
    }
    const bool long_axis = *std::max_element(scan.shape, scan.shape + 3) > kLongestAxis;
    if (long_axis || voxels > std::numeric_limits<int32_t>::max()) {
        throw Error(QSM_DATA_ERROR,
                    text("a volume of %d x %d x %d is too large: at most %d voxels "
                         "along an axis and 2^31 - 1 in all",
                         scan.shape[0], scan.shape[1], scan.shape[2], kLongestAxis));
    }
    auto &b = geometry.b0_direction;
    for (size_t axis = 0; axis < 3; ++axis) {
        const size_t stored = axes.order[axis];
        geometry.shape[axis] = scan.shape[stored];
        geometry.voxel_size_mm[axis] = scan.voxel_size_mm[stored];
        b[axis] = (axes.flipped[axis] ? -1 : 1) * scan.b0_direction[stored] + 0.0;  // -0 is 0
    }
    if (!is_voxel_size(geometry.voxel_size_mm)) {
        throw Error(QSM_DATA_ERROR,
                    text("voxel size must be %g to %g mm, got %s mm", kSmallestVoxelMm,
                         kLargestVoxelMm, vector_text(scan.voxel_size_mm).c_str()));
    }
    if (!is_direction(b)) {
        throw Error(QSM_DATA_ERROR, "B0 direction must be finite and non-zero, got " +
                                        vector_text(scan.b0_direction));
    }
    const double length = norm(b);  // not of the stored order, which would round in another way
    for (double &component : b) component /= length;
    return geometry;
}

Scan scan_from(const qsm_scan &given, const Layout &layout, FieldKind kind) {
    Scan scan{layout, geometry_from(given, layout.axes), {}, {}, {}};
    scan.local_field_ppm.resize(scan.geometry.voxels());
    scan.mask.resize(scan.geometry.voxels());
    size_t inside = 0, bad = 0;
    over_voxels(scan.geometry.shape, layout, [&](size_t here, size_t there) {
        if (!given.mask[there]) return;
        const float value = given.local_field_ppm[there];
        scan.mask[here] = 1;
        scan.local_field_ppm[here] = value;
        ++inside;
        if (!std::isfinite(value)) ++bad;
    });
    if (!inside) {
        throw Error(QSM_DATA_ERROR,
                    "the mask is empty; pass one that is non-zero inside the brain");
    }
    if (bad) {
        throw Error(QSM_DATA_ERROR,
                    text("%zu of %zu voxels of the field inside the mask are NaN or Inf; take them "
                         "out of the mask, or repair the field",
                         bad, inside));
    }
    if (kind == FieldKind::kTotal) {
        require_total_ppm(scan);
    } else {
        require_ppm(scan);
    }
    return scan;
}

void erode_mask(Scan &scan, double radius) {
    const Shape &shape = scan.geometry.shape;
    const double far = 1e18;
    // Squared distance to the outside, one axis after the other; beyond the grid is outside.
    std::vector<double> squared(scan.mask.size());
    std::transform(scan.mask.begin(), scan.mask.end(), squared.begin(),
                   [&](uint8_t inside) { return inside ? far : 0; });
    const size_t strides[] = {size_t(shape[1]) * size_t(shape[2]), size_t(shape[2]), 1};
    for (size_t axis = 0; axis < 3; ++axis) {
        const int64_t n = shape[axis], reach = int64_t(std::min(radius, double(n))) + 1;
        const size_t stride = strides[axis];
        std::vector<double> line(static_cast<size_t>(n));
        for (size_t first = 0; first < squared.size(); ++first) {
            if (first / stride % size_t(n) != 0) continue;
            for (int64_t i = 0; i < n; ++i) line[size_t(i)] = squared[first + size_t(i) * stride];
            for (int64_t i = 0; i < n; ++i) {
                const auto edge = double(std::min(i, n - 1 - i) + 1);
                double least = std::min(line[size_t(i)], edge * edge);
                for (int64_t j = std::max<int64_t>(0, i - reach); j < std::min(n, i + reach + 1);
                     ++j) {
                    least = std::min(least, line[size_t(j)] + double((i - j) * (i - j)));
                }
                squared[first + size_t(i) * stride] = least;
            }
        }
    }
    size_t before = 0, after = 0;
    for (size_t i = 0; i < scan.mask.size(); ++i) {
        before += scan.mask[i];
        scan.mask[i] = scan.mask[i] && std::sqrt(squared[i]) > radius;
        after += scan.mask[i];
    }
    if (!after) {
        throw Error(QSM_DATA_ERROR, text("the network needs the mask eroded by %g voxels, which "
                                         "leaves nothing; pass a larger mask",
                                         radius));
    }
    scan.notes.push_back(text("the mask was eroded by %g voxels, %.0f %% of it is left", radius,
                              100.0 * double(after) / double(before)));
}

void store(const Volume &volume, const Scan &scan, float *to) {
    over_voxels(scan.geometry.shape, scan.layout,
                [&](size_t here, size_t there) { to[there] = volume[here]; });
}

std::string deviations(const GeometryLimits &limits, const Geometry &geometry) {
    std::string found;
    if (limits.voxel_size_mm) {
        const auto &mm = *limits.voxel_size_mm;
        const double expected[] = {mm[0], mm[1], mm[2]};
        double off = 0;
        for (int axis = 0; axis < 3; ++axis) {
            off = std::max(off, std::fabs(geometry.voxel_size_mm[axis] / expected[axis] - 1));
        }
        if (off > *limits.voxel_tolerance) {
            found = "voxel size " + vector_text(geometry.voxel_size_mm) +
                    " mm, the network was trained at " + vector_text(expected) +
                    text(" mm (+-%.0f %% per axis)", 100 * *limits.voxel_tolerance);
        }
    }
    if (limits.b0_direction) {
        const auto &b = *limits.b0_direction;
        const double expected[] = {b[0], b[1], b[2]};
        double cosine = 0;
        for (int axis = 0; axis < 3; ++axis) cosine += geometry.b0_direction[axis] * expected[axis];
        const double angle = std::acos(std::min(1.0, std::fabs(cosine) / norm(expected)));
        const double degrees = 180 / std::acos(-1.0) * angle;
        if (degrees > *limits.b0_tolerance_deg) {
            found += (found.empty() ? "" : "; ") +
                     text("B0 direction %.1f degrees off the %s of the training (at most %g): "
                          "expected error about %.0f %% (2 sin %.0f deg)",
                          degrees, vector_text(expected).c_str(), *limits.b0_tolerance_deg,
                          200 * std::sin(angle), degrees);
        }
    }
    return found;
}

}  // namespace qsm::host
