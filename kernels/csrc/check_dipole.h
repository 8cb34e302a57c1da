// From the caller's description of the operator to what the kernel computes with.
#ifndef QSM_CHECK_DIPOLE_H
#define QSM_CHECK_DIPOLE_H

#include <algorithm>
#include <cmath>

#include "check_size.h"
#include "scale_spectrum.h"

namespace qsm {

constexpr double kSmallestVoxelMm = 0.01, kLargestVoxelMm = 100;

inline Status check_geometry(const qsm_cuda_dipole &op, KGrid &grid) {
    for (const double size : op.voxel_size_mm) {
        if (!(size >= kSmallestVoxelMm && size <= kLargestVoxelMm)) {
            return fail(QSM_CUDA_BAD_GEOMETRY,
                        "voxel size must be %g to %g mm, got (%g, %g, %g) mm", kSmallestVoxelMm,
                        kLargestVoxelMm, op.voxel_size_mm[0], op.voxel_size_mm[1],
                        op.voxel_size_mm[2]);
        }
    }
    const double *b = op.b0_direction;
    const double norm = std::sqrt(b[0] * b[0] + b[1] * b[1] + b[2] * b[2]);
    if (!(norm > 0 && std::isfinite(norm))) {
        return fail(QSM_CUDA_BAD_GEOMETRY,
                    "B0 direction must be finite and non-zero, got (%g, %g, %g)", b[0], b[1], b[2]);
    }
    double frequency[3];
    for (int axis = 0; axis < 3; ++axis) {
        frequency[axis] = 1 / (op.shape[axis] * op.voxel_size_mm[axis]);
    }
    const double largest = *std::max_element(frequency, frequency + 3);
    for (int axis = 0; axis < 3; ++axis) {
        grid.shape[axis] = op.shape[axis];
        grid.step[axis] = static_cast<float>(frequency[axis] / largest);
        grid.b0[axis] = static_cast<float>(b[axis] / norm);
    }
    return QSM_CUDA_OK;
}

inline Status check_multiplier(const qsm_cuda_dipole &op, Multiplier &g) {
    g = {op.multiplier, 0};
    switch (op.multiplier) {
        case QSM_CUDA_DIPOLE:
        case QSM_CUDA_DIPOLE_SQUARED:
            return QSM_CUDA_OK;
        case QSM_CUDA_TKD:
            g.parameter = static_cast<float>(op.tkd_threshold);
            if (op.tkd_threshold > 0 && op.tkd_threshold <= 2.0 / 3) return QSM_CUDA_OK;
            return fail(QSM_CUDA_BAD_MULTIPLIER, "the TKD threshold must lie in (0, 2/3], got %g",
                        op.tkd_threshold);
        case QSM_CUDA_TIKHONOV:
            g.parameter = static_cast<float>(op.tikhonov_lambda);
            if (g.parameter > 0 && std::isfinite(g.parameter)) return QSM_CUDA_OK;
            return fail(QSM_CUDA_BAD_MULTIPLIER,
                        "Tikhonov's lambda must be positive and finite in float32, got %g",
                        op.tikhonov_lambda);
        default:
            return fail(QSM_CUDA_BAD_MULTIPLIER,
                        "unknown multiplier %d; qsm_cuda_multiplier lists 0 to 3", op.multiplier);
    }
}

// Fills all of `scale` but its spectrum.
inline Status check_dipole(const qsm_cuda_dipole *op, ScaleSpectrum &scale) {
    if (!op) return fail(QSM_CUDA_NULL_POINTER, "op is a null pointer");
    QSM_TRY(check_size("a volume", op->shape, op->batch, "batch"));
    QSM_TRY(check_geometry(*op, scale.grid));
    QSM_TRY(check_multiplier(*op, scale.g));
    scale.spectrum = nullptr;
    scale.one_over_n =
        static_cast<float>(1 / (double(op->shape[0]) * op->shape[1] * op->shape[2]));
    return QSM_CUDA_OK;
}

}  // namespace qsm

#endif
