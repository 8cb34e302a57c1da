// Multiplies half spectra by E(k) / N, row by row.
#ifndef QSM_SCALE_SPECTRUM_H
#define QSM_SCALE_SPECTRUM_H

#include "k_space.h"

namespace qsm {

struct alignas(8) Complex {  // as cufftComplex, which needs CUDA's headers
    float re, im;
};

// Spectra (batch, x, y, z/2+1) of real volumes. A row is one z line; see launch.h.
struct ScaleSpectrum {
    Complex *spectrum;
    KGrid grid;
    Multiplier g;
    float one_over_n;

    struct Row {
        const ScaleSpectrum &all;
        Complex *values;
        int32_t mx, my;

        QSM_HOST_DEVICE void operator()(int32_t z) const {
            const int32_t mz = signed_index(z, all.grid.shape[2]);
            const float e = symmetrised(all.grid, all.g, mx, my, mz) * all.one_over_n;
            const Complex value = values[z];
            values[z] = {value.re * e, value.im * e};
        }
    };

    QSM_HOST_DEVICE int32_t columns() const { return grid.shape[2] / 2 + 1; }

    QSM_HOST_DEVICE Row row(int32_t index) const {
        const int32_t y = index % grid.shape[1], x = index / grid.shape[1] % grid.shape[0];
        return {*this, spectrum + int64_t{index} * columns(), signed_index(x, grid.shape[0]),
                signed_index(y, grid.shape[1])};
    }
};

}  // namespace qsm

#endif
