// y = F^-1 [E(k) F x] of a zero-padded volume, with E as in kernels/dipole.py.
#ifndef QSM_RUNTIME_DIPOLE_FILTER_H
#define QSM_RUNTIME_DIPOLE_FILTER_H

#include <functional>

#include "fft.h"
#include "scan.h"

namespace qsm::host {

using Response = std::function<float(float)>;  // g: what the multiplier makes of the unit dipole

// Returns that of an index of an axis, as numpy.fft.fftfreq.
double frequency(int32_t i, int32_t n, double spacing);

// Returns g for TKD: sign(D) / max(|D|, threshold), 0 on the magic cone.
Response tkd_response(double threshold);

// Returns E(k) on the half spectrum (x, y, z / 2 + 1), bit for bit that of kernels/dipole.py: the
// last bit decides on which side of the magic cone a frequency lies, and the sign of a large number.
Volume half_multiplier(const Geometry &geometry, const Response &g);

// Sets x, with the transform's room between rows, to F^-1 [e F x].
void multiply_spectrum(Fft &fft, float *x, const Volume &e);

// Filters volumes of one grid. Multipliers are made once, for any number of volumes.
class DipoleFilter {
  public:
    DipoleFilter(const Geometry &geometry, int32_t pad_voxels, int threads);

    Volume multiplier(const Response &g) const { return half_multiplier(padded_, g); }
    Volume apply(const Volume &volume, const Volume &multiplier);

  private:
    const Geometry geometry_, padded_;
    const int32_t pad_voxels_;
    Fft fft_;
    Volume work_;  // padded
};

}  // namespace qsm::host

#endif
