// y = F^-1 [E(k) F x] of a zero-padded volume, with E as in kernels/dipole.py and the transform as
// products with cosine and sine matrices, which the inference engine computes.
#ifndef QSM_RUNTIME_DIPOLE_FILTER_H
#define QSM_RUNTIME_DIPOLE_FILTER_H

#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "scan.h"

namespace qsm::host {

using Response = std::function<float(float)>;  // g: what the multiplier makes of the unit dipole

// Returns g for TKD: sign(D) / max(|D|, threshold), 0 on the magic cone.
Response tkd_response(double threshold);

// Returns E(k) / N on the half spectrum (x, y, z / 2 + 1), every frequency counted as often as it
// stands for. Bit for bit that of kernels/dipole.py before the division: on which side of the magic
// cone a frequency lies is a matter of the last bit, and decides the sign of a large number.
Volume half_multiplier(const Geometry &geometry, const Response &g);

// The transform and its inverse for volumes of one shape, and a product in between.
class SpectralProduct {
  public:
    virtual ~SpectralProduct() = default;

    // Sets y, which may be x, to F^-1 [e F x] for an e as half_multiplier() makes it.
    virtual void apply(const float *x, const float *e, float *y) = 0;
};

// As the inference engine computes it; defined beside the engine's session.
std::unique_ptr<SpectralProduct> open_spectral_product(const Shape &shape, int threads);

// Filters volumes of one grid. Multipliers are made once, for any number of volumes.
class DipoleFilter {
  public:
    DipoleFilter(const Geometry &geometry, int32_t pad_voxels, int threads);

    Volume multiplier(const Response &g) const { return half_multiplier(padded_, g); }
    Volume apply(const Volume &volume, const Volume &multiplier);

  private:
    const Geometry geometry_, padded_;
    const int32_t pad_voxels_;
    std::unique_ptr<SpectralProduct> product_;
    Volume work_;  // padded
};

}  // namespace qsm::host

#endif
