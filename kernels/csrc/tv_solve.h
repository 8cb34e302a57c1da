// The linear step of total variation in k-space: both spectra are replaced in one pass.
#ifndef QSM_TV_SOLVE_H
#define QSM_TV_SOLVE_H

#include "scale_spectrum.h"

namespace qsm {

// What |G|^2 has for index m of an axis of n, times the squared voxel size: 2 - 2 cos(2 pi m / n),
// which in this form loses no digits near 0.
QSM_HOST_DEVICE float squared_gradient(int32_t m, int32_t n) {
    const float sine = sinf(3.14159265f * static_cast<float>(m) / static_cast<float>(n));
    return 4 * sine * sine;
}

// Half spectra (batch, x, y, z/2+1) of b and q2 become those of x = (b + D q2) /
// (D^2 + mu1 L + mu3) / N and of D x. A row is one z line; see launch.h.
struct TvSolve {
    Complex *b, *q2;
    Placement placement;
    float weight[3];  // mu1 / h^2 along each axis
    float mu3;

    struct Row {
        const TvSolve &all;
        Complex *b, *q2;
        int32_t mx, my;
        float along_xy;  // mu1 L + mu3 but for what z adds

        QSM_HOST_DEVICE void operator()(int32_t z) const {
            const KGrid &grid = all.placement.grid;
            const int32_t nz = grid.shape[2], mz = signed_index(z, nz);
            const float d = symmetrised(grid, {QSM_CUDA_DIPOLE, 0}, mx, my, mz);
            const float along_z = all.weight[2] * squared_gradient(mz, nz);
            const float scale = all.placement.one_over_n / (d * d + along_xy + along_z);
            const Complex one = b[z], other = q2[z];
            const Complex x = {(one.re + d * other.re) * scale, (one.im + d * other.im) * scale};
            b[z] = x;
            q2[z] = {d * x.re, d * x.im};
        }
    };

    QSM_HOST_DEVICE int32_t columns() const { return placement.grid.shape[2] / 2 + 1; }

    QSM_HOST_DEVICE Row row(int32_t index) const {
        const int32_t nx = placement.grid.shape[0], ny = placement.grid.shape[1];
        const int32_t mx = signed_index(index / ny % nx, nx), my = signed_index(index % ny, ny);
        const int64_t first = int64_t{index} * columns();
        return {*this, b + first, q2 + first, mx, my,
                weight[0] * squared_gradient(mx, nx) + weight[1] * squared_gradient(my, ny) + mu3};
    }
};

}  // namespace qsm

#endif
