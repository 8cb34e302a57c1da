// The pointwise steps of total variation: shrinkage of the gradient, sources outside the support,
// field outside the mask, and the right-hand side that they make.
#ifndef QSM_TV_SPLIT_H
#define QSM_TV_SPLIT_H

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "qsm_cuda.h"

namespace qsm {

// From index i of a periodic axis to its neighbours.
QSM_HOST_DEVICE int32_t to_next(int32_t i, int32_t n) { return i + 1 < n ? 1 : 1 - n; }
QSM_HOST_DEVICE int32_t to_previous(int32_t i, int32_t n) { return i > 0 ? -1 : n - 1; }

// A row is one z line of volumes (batch, x, y, z); see launch.h. What the neighbours' duals become
// is computed again from the old ones, so that one pass is enough: hence s1 and s1_next.
struct TvSplit {
    qsm_cuda_tv tv;
    const float *s1;
    float *s1_next;
    int64_t voxels;   // of a component of s1
    float per_mm[3];  // 1 / h
    float limit, mu1, mu3;

    struct Shrunk {
        float s1, q1;
    };

    // v = G x + s1 from a voxel to the next along an axis; s1 = clip(v), q1 = v - 2 s1.
    QSM_HOST_DEVICE Shrunk shrunk(int axis, int64_t at, int64_t next) const {
        const float v = (tv.x[next] - tv.x[at]) * per_mm[axis] + s1[axis * voxels + at];
        const float clipped = fminf(fmaxf(v, -limit), limit);
        return {clipped, v - 2 * clipped};
    }

    struct Row {
        const TvSplit &all;
        int64_t first, next_x, next_y, previous_x, previous_y;

        QSM_HOST_DEVICE void operator()(int32_t z) const {
            const qsm_cuda_tv &tv = all.tv;
            const int32_t nz = tv.grid.shape[2];
            const int64_t at = first + z;
            const int64_t next[] = {next_x, next_y, to_next(z, nz)};
            const int64_t previous[] = {previous_x, previous_y, to_previous(z, nz)};
            float divergence = 0;
            for (int axis = 0; axis < 3; ++axis) {
                const Shrunk here = all.shrunk(axis, at, at + next[axis]);
                const Shrunk there = all.shrunk(axis, at + previous[axis], at);
                all.s1_next[axis * all.voxels + at] = here.s1;
                divergence += (there.q1 - here.q1) * all.per_mm[axis];
            }
            const float q3 = tv.support[at] ? tv.x[at] : -(tv.s3[at] += tv.x[at]);
            tv.b[at] = all.mu3 * q3 + all.mu1 * divergence;
            if (tv.mask[at]) tv.q2[at] = tv.field[at];
        }
    };

    QSM_HOST_DEVICE int32_t columns() const { return tv.grid.shape[2]; }

    QSM_HOST_DEVICE Row row(int32_t index) const {
        const int32_t nx = tv.grid.shape[0], ny = tv.grid.shape[1];
        const int32_t x = index / ny % nx, y = index % ny;
        const int64_t along_y = columns(), along_x = along_y * ny;
        return {*this,
                index * along_y,
                to_next(x, nx) * along_x,
                to_next(y, ny) * along_y,
                to_previous(x, nx) * along_x,
                to_previous(y, ny) * along_y};
    }
};

}  // namespace qsm

#endif
