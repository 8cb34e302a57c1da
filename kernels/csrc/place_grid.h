// Reads a geometry where the GPU has it, for the kernel that comes after on the stream.
#ifndef QSM_PLACE_GRID_H
#define QSM_PLACE_GRID_H

#include "scale_spectrum.h"

namespace qsm {

// One row of one column; see launch.h.
struct PlaceGrid {
    const float *voxel_size_mm, *b0_direction;  // 3 each
    Placement unplaced;                         // all but steps and direction
    Placement *placed;

    struct Row {
        const PlaceGrid &all;

        QSM_HOST_DEVICE void operator()(int32_t) const {
            const float *v = all.voxel_size_mm, *b = all.b0_direction;
            const double size[3] = {v[0], v[1], v[2]}, direction[3] = {b[0], b[1], b[2]};
            Placement placement = all.unplaced;
            place(placement.grid, size, direction);
            // The host does not see these values, so nobody can be told; NaN cannot be overlooked.
            if (!is_voxel_size(size) || !is_direction(direction)) placement.one_over_n = NAN;
            *all.placed = placement;
        }
    };

    QSM_HOST_DEVICE int32_t columns() const { return 1; }
    QSM_HOST_DEVICE Row row(int32_t) const { return {*this}; }
};

}  // namespace qsm

#endif
