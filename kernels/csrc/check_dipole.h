// From the caller's description of the operator to what the kernel computes with.
#ifndef QSM_CHECK_DIPOLE_H
#define QSM_CHECK_DIPOLE_H

#include <algorithm>
#include <cmath>

#include "check_size.h"
#include "scale_spectrum.h"

namespace qsm {

inline Status check_geometry(const qsm_cuda_dipole &op) {
    const double *size = op.voxel_size_mm, *b = op.b0_direction;
    if (!is_voxel_size(op.voxel_size_mm)) {
        return fail(QSM_CUDA_BAD_GEOMETRY,
                    "voxel size must be %g to %g mm, got (%g, %g, %g) mm", kSmallestVoxelMm,
                    kLargestVoxelMm, size[0], size[1], size[2]);
    }
    if (is_direction(op.b0_direction)) return QSM_CUDA_OK;
    return fail(QSM_CUDA_BAD_GEOMETRY,
                "B0 direction must be finite and non-zero, got (%g, %g, %g)", b[0], b[1], b[2]);
}

inline Status check_multiplier(const qsm_cuda_dipole &op, Multiplier &g) {
    g = {op.multiplier, 0};
    switch (op.multiplier) {
        case QSM_CUDA_DIPOLE:
        case QSM_CUDA_DIPOLE_SQUARED:
            return QSM_CUDA_OK;
        case QSM_CUDA_TKD:
            g.parameter = static_cast<float>(op.tkd_threshold);
            // In float32, which rounds 2/3 up: files keep the threshold so.
            if (g.parameter > 0 && g.parameter <= 2.0f / 3) return QSM_CUDA_OK;
            return fail(QSM_CUDA_BAD_MULTIPLIER, "the TKD threshold must lie in (0, 2/3], got %g",
                        op.tkd_threshold);
        case QSM_CUDA_TIKHONOV:
        case QSM_CUDA_TIKHONOV_PRIOR:
            g.parameter = static_cast<float>(op.tikhonov_lambda);
            if (g.parameter > 0 && std::isfinite(g.parameter)) return QSM_CUDA_OK;
            return fail(QSM_CUDA_BAD_MULTIPLIER,
                        "Tikhonov's lambda must be positive and finite in float32, got %g",
                        op.tikhonov_lambda);
        default:
            return fail(QSM_CUDA_BAD_MULTIPLIER,
                        "unknown multiplier %d; qsm_cuda_multiplier lists 0 to 4", op.multiplier);
    }
}

// Fills all of `scale` but its spectrum and what depends on the geometry.
inline Status check_all_but_geometry(const qsm_cuda_dipole *op, ScaleSpectrum &scale) {
    if (!op) return fail(QSM_CUDA_NULL_POINTER, "op is a null pointer");
    QSM_TRY(check_size("a volume", op->shape, op->batch, "batch"));
    scale = {};
    QSM_TRY(check_multiplier(*op, scale.g));
    std::copy_n(op->shape, 3, scale.placement.grid.shape);
    scale.placement.one_over_n =
        static_cast<float>(1 / (double(op->shape[0]) * op->shape[1] * op->shape[2]));
    return QSM_CUDA_OK;
}

// Fills all of `scale` but its spectrum.
inline Status check_dipole(const qsm_cuda_dipole *op, ScaleSpectrum &scale) {
    QSM_TRY(check_all_but_geometry(op, scale));
    QSM_TRY(check_geometry(*op));
    place(scale.placement.grid, op->voxel_size_mm, op->b0_direction);
    return QSM_CUDA_OK;
}

}  // namespace qsm

#endif
