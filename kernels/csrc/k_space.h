// The multiplier E at an index of k-space.
#ifndef QSM_K_SPACE_H
#define QSM_K_SPACE_H

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "qsm_cuda.h"

namespace qsm {

constexpr float kCone = 1e-6f;  // below it D is zero within float32 rounding, its sign noise
constexpr double kSmallestVoxelMm = 0.01, kLargestVoxelMm = 100;

// D depends on the direction of k only, so `step` is in units of the largest of the three: on
// an isotropic cube frequencies are whole numbers, and exact.
struct KGrid {
    int32_t shape[3];  // voxels of the volume, not of its half spectrum
    float step[3];     // frequency per index
    float b0[3];       // unit vector
};

QSM_HOST_DEVICE bool is_voxel_size(const double (&mm)[3]) {
    for (const double size : mm) {
        if (!(size >= kSmallestVoxelMm && size <= kLargestVoxelMm)) return false;
    }
    return true;
}

QSM_HOST_DEVICE double norm(const double (&b)[3]) {
    return sqrt(b[0] * b[0] + b[1] * b[1] + b[2] * b[2]);
}

QSM_HOST_DEVICE bool is_direction(const double (&b)[3]) {
    return norm(b) > 0 && norm(b) <= DBL_MAX;
}

// Sets all of a grid but its shape.
QSM_HOST_DEVICE void place(KGrid &grid, const double (&voxel_size_mm)[3],
                           const double (&b0_direction)[3]) {
    double frequency[3], largest = 0;
    for (int axis = 0; axis < 3; ++axis) {
        frequency[axis] = 1 / (grid.shape[axis] * voxel_size_mm[axis]);
        largest = fmax(largest, frequency[axis]);
    }
    for (int axis = 0; axis < 3; ++axis) {
        grid.step[axis] = static_cast<float>(frequency[axis] / largest);
        grid.b0[axis] = static_cast<float>(b0_direction[axis] / norm(b0_direction));
    }
}

// Signed index in the order of the transform (fftfreq): 0 .. , then the negative ones.
QSM_HOST_DEVICE int32_t signed_index(int32_t i, int32_t n) { return i < n - n / 2 ? i : i - n; }

// On even axes index n/2 is its own negative on the grid: there D(k) and D(-k) differ.
QSM_HOST_DEVICE bool is_nyquist(int32_t m, int32_t n) { return 2 * m == -n; }

QSM_HOST_DEVICE int32_t negated(int32_t m, int32_t n) { return is_nyquist(m, n) ? m : -m; }

// D at signed indices; 0 at the origin.
QSM_HOST_DEVICE float dipole(const KGrid &grid, int32_t mx, int32_t my, int32_t mz) {
    const float kx = static_cast<float>(mx) * grid.step[0];
    const float ky = static_cast<float>(my) * grid.step[1];
    const float kz = static_cast<float>(mz) * grid.step[2];
    const float k_squared = kx * kx + ky * ky + kz * kz;
    if (k_squared == 0) return 0;
    const float along_b = kx * grid.b0[0] + ky * grid.b0[1] + kz * grid.b0[2];
    return 1.0f / 3 - along_b * along_b / k_squared;
}

// g: a power of D or a regularised inverse. The choice is the same for all of a launch, so the
// branch costs nothing beside the memory traffic.
struct Multiplier {
    int32_t kind;
    float parameter;

    QSM_HOST_DEVICE float operator()(float d) const {
        switch (kind) {
            case QSM_CUDA_DIPOLE_SQUARED:
                return d * d;
            case QSM_CUDA_TKD:
                return fabsf(d) < kCone ? 0 : copysignf(1 / fmaxf(fabsf(d), parameter), d);
            case QSM_CUDA_TIKHONOV:
                return d / (d * d + parameter);
            case QSM_CUDA_TIKHONOV_PRIOR:
                return parameter / (d * d + parameter);
            default:
                return d;
        }
    }
};

// E = (g(D(k)) + g(D(-k))) / 2, symmetrised after g.
QSM_HOST_DEVICE float symmetrised(const KGrid &grid, const Multiplier &g, int32_t mx, int32_t my,
                                  int32_t mz) {
    const float e = g(dipole(grid, mx, my, mz));
    const int32_t nx = negated(mx, grid.shape[0]);
    const int32_t ny = negated(my, grid.shape[1]);
    const int32_t nz = negated(mz, grid.shape[2]);
    if (nx == -mx && ny == -my && nz == -mz) return e;
    return 0.5f * (e + g(dipole(grid, nx, ny, nz)));
}

}  // namespace qsm

#endif
