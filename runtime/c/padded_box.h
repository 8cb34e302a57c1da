// The box of a mask, with room around it for sources just outside; see kernels/inversion/grid.py.
#ifndef QSM_RUNTIME_PADDED_BOX_H
#define QSM_RUNTIME_PADDED_BOX_H

#include <vector>

#include "patches.h"
#include "scan.h"

namespace qsm::host {

// Where a voxel lies: in the mask, within 5 mm of it, beyond.
enum Place : uint8_t { kMeasured, kSupport, kBeyond };

// Volumes on the grid have rows of z `row` elements apart, as many as there is room for.
struct PaddedBox {
    explicit PaddedBox(const Scan &scan);

    const Scan &scan;
    Box box;
    Shape pads;         // before the box
    Geometry geometry;  // of lengths that transform fast

    // Returns the place of every voxel; kBeyond between rows.
    std::vector<uint8_t> places(size_t row) const;

    // Calls body(at, padded) with the places of each voxel of the mask in the scan and on the grid.
    template <class Body>
    void over_mask(size_t row, Body &&body) const {
        const Shape &n = scan.geometry.shape;
        for (int32_t x = box[0].start; x < box[0].stop; ++x) {
            for (int32_t y = box[1].start; y < box[1].stop; ++y) {
                const size_t from = (size_t(x) * size_t(n[1]) + size_t(y)) * size_t(n[2]);
                const size_t to = (size_t(x - box[0].start + pads[0]) * size_t(geometry.shape[1]) +
                                   size_t(y - box[1].start + pads[1])) *
                                      row +
                                  size_t(pads[2] - box[2].start);
                for (auto z = size_t(box[2].start); z < size_t(box[2].stop); ++z) {
                    if (scan.mask[from + z]) body(from + z, to + z);
                }
            }
        }
    }
};

}  // namespace qsm::host

#endif
