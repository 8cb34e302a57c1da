// Multiplies half spectra by E(k) / N, row by row.
#ifndef QSM_SCALE_SPECTRUM_H
#define QSM_SCALE_SPECTRUM_H

#include "k_space.h"

namespace qsm {

struct alignas(8) Complex {  // as cufftComplex, which needs CUDA's headers
    float re, im;
};

// What E(k) / N depends on beside g.
struct Placement {
    KGrid grid;
    float one_over_n;
};

// Spectra (batch, x, y, z/2+1) of real volumes. A row is one z line; see launch.h.
struct ScaleSpectrum {
    Complex *spectrum;
    Placement placement;
    const Placement *placed;  // the same in the GPU's memory; null: `placement` counts
    Multiplier g;

    struct Row {
        Placement placement;
        Multiplier g;
        Complex *values;
        int32_t mx, my;

        QSM_HOST_DEVICE void operator()(int32_t z) const {
            const int32_t mz = signed_index(z, placement.grid.shape[2]);
            const float e = symmetrised(placement.grid, g, mx, my, mz) * placement.one_over_n;
            const Complex value = values[z];
            values[z] = {value.re * e, value.im * e};
        }
    };

    QSM_HOST_DEVICE int32_t columns() const { return placement.grid.shape[2] / 2 + 1; }

    QSM_HOST_DEVICE Row row(int32_t index) const {
        const int32_t nx = placement.grid.shape[0], ny = placement.grid.shape[1];
        const int32_t y = index % ny, x = index / ny % nx;
        return {placed ? *placed : placement, g, spectrum + int64_t{index} * columns(),
                signed_index(x, nx), signed_index(y, ny)};
    }
};

}  // namespace qsm

#endif
