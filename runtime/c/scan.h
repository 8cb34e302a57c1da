// One acquisition as the rest computes with it: copied out of the caller's memory and checked.
#ifndef QSM_RUNTIME_SCAN_H
#define QSM_RUNTIME_SCAN_H

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "axes.h"
#include "card.h"
#include "qsm_runtime.h"

namespace qsm::host {

using Shape = std::array<int32_t, 3>;  // voxels along (x, y, z)
using Volume = std::vector<float>;     // z fastest

struct Geometry {
    Shape shape;
    double voxel_size_mm[3];
    double b0_direction[3];  // unit vector

    size_t voxels() const { return voxels_of(shape); }
    Geometry padded(int32_t pad_voxels) const;

    static size_t voxels_of(const Shape &shape) {
        return size_t(shape[0]) * size_t(shape[1]) * size_t(shape[2]);
    }
};

// How the caller's volumes lie in memory, and how the axes we compute in are made of theirs.
struct Layout {
    qsm_memory_order order;
    Axes axes;
};

struct Scan {
    Layout layout;
    Geometry geometry;  // as the volumes, in our axes
    Volume local_field_ppm;     // or a total field; 0 outside the mask that was given
    std::vector<uint8_t> mask;  // 0 or 1
    std::vector<std::string> notes;
};

constexpr size_t kScanBytes = sizeof(float) + 1;  // of a voxel

// Checks pointers, sizes and directions; the volumes are not looked at.
Geometry geometry_from(const qsm_scan &scan, const Axes &axes);

// Of the sources inside the mask, or of all.
enum class FieldKind { kLocal, kTotal };

// Copies and checks the volumes.
Scan scan_from(const qsm_scan &scan, const Layout &layout, FieldKind kind);

// Takes all voxels within a radius of the mask's outside out of it.
void erode_mask(Scan &scan, double radius_voxels);

// Writes a volume of a scan as the caller's lie.
void store(const Volume &volume, const Scan &scan, float *to);

// Returns how a grid departs from what a network was trained for, "" for not at all.
std::string deviations(const GeometryLimits &limits, const Geometry &geometry);

}  // namespace qsm::host

#endif
