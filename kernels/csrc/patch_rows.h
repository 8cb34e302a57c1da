// What gathering, accumulating and finishing do to a row of voxels along z.
#ifndef QSM_PATCH_ROWS_H
#define QSM_PATCH_ROWS_H

#include <cstdint>

#include "host_device.h"
#include "qsm_cuda.h"

namespace qsm {

// Where a row of the patch lies. Voxels of the volume are counted in 64 bits: a box may start
// near either end of int32.
struct PatchRow {
    int32_t channel, x, y;  // in the patch
    bool inside;            // its x and y lie in the volume
    int64_t first;          // of the volume's voxels with this x and y, those of one channel

    QSM_HOST_DEVICE PatchRow(const qsm_cuda_patch &box, int32_t index) {
        y = index % box.size[1];
        x = index / box.size[1] % box.size[0];
        channel = index / box.size[1] / box.size[0];
        const int64_t vx = int64_t{box.start[0]} + x, vy = int64_t{box.start[1]} + y;
        inside = vx >= 0 && vx < box.volume[0] && vy >= 0 && vy < box.volume[1];
        first = inside ? (vx * box.volume[1] + vy) * box.volume[2] : 0;
    }
};

QSM_HOST_DEVICE int64_t voxels_of_volume(const qsm_cuda_patch &box) {
    return int64_t{box.volume[0]} * box.volume[1] * box.volume[2];
}

// The volume's z of a patch voxel, or -1 beyond the volume.
QSM_HOST_DEVICE int64_t volume_z(const qsm_cuda_patch &box, int32_t z) {
    const int64_t vz = int64_t{box.start[2]} + z;
    return vz >= 0 && vz < box.volume[2] ? vz : -1;
}

struct Gather {
    qsm_cuda_patch box;
    const float *volume;
    float *patch;

    struct Row {
        const Gather &all;
        PatchRow at;
        const float *from;
        float *to;

        QSM_HOST_DEVICE void operator()(int32_t z) const {
            const int64_t vz = volume_z(all.box, z);
            to[z] = at.inside && vz >= 0 ? from[vz] : 0;
        }
    };

    QSM_HOST_DEVICE int32_t columns() const { return box.size[2]; }

    QSM_HOST_DEVICE Row row(int32_t index) const {
        const PatchRow at(box, index);
        return {*this, at, volume + at.channel * voxels_of_volume(box) + at.first,
                patch + int64_t{index} * columns()};
    }
};

struct Accumulate {
    qsm_cuda_patch box;
    const float *patch, *window_x, *window_y, *window_z;
    float *total, *weight;

    struct Row {
        const Accumulate &all;
        PatchRow at;
        const float *from;
        float *to;
        float window_xy;

        QSM_HOST_DEVICE void operator()(int32_t z) const {
            const int64_t vz = volume_z(all.box, z);
            if (!at.inside || vz < 0) return;
            // In this order, which is numpy's.
            to[vz] += from[z] * window_xy * all.window_z[z];
            if (all.weight && at.channel == 0) {
                all.weight[at.first + vz] += window_xy * all.window_z[z];
            }
        }
    };

    QSM_HOST_DEVICE int32_t columns() const { return box.size[2]; }

    QSM_HOST_DEVICE Row row(int32_t index) const {
        const PatchRow at(box, index);
        return {*this, at, patch + int64_t{index} * columns(),
                total + at.channel * voxels_of_volume(box) + at.first,
                window_x[at.x] * window_y[at.y]};
    }
};

struct Finish {
    qsm_cuda_patch box;  // inside the volume
    const float *total, *weight;
    const uint8_t *mask;
    float *output;

    struct Row {
        const Finish &all;
        PatchRow at;
        const float *from;
        float *to;

        QSM_HOST_DEVICE void operator()(int32_t z) const {
            const int64_t vz = volume_z(all.box, z);
            float value = from[vz];
            if (all.weight) {
                const float weight = all.weight[at.first + vz];
                value = weight == 0 ? 0 : value / weight;
            }
            // Multiplied, not replaced: what is not finite must be seen, outside the mask too.
            if (all.mask) value *= all.mask[at.first + vz] ? 1.0f : 0.0f;
            to[z] = value;
        }
    };

    QSM_HOST_DEVICE int32_t columns() const { return box.size[2]; }

    QSM_HOST_DEVICE Row row(int32_t index) const {
        const PatchRow at(box, index);
        return {*this, at, total + at.channel * voxels_of_volume(box) + at.first,
                output + int64_t{index} * columns()};
    }
};

}  // namespace qsm

#endif
