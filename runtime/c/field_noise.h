// The noise of a field, from its spectrum on the magic cone; see kernels/inversion/field_noise.py.
#ifndef QSM_RUNTIME_FIELD_NOISE_H
#define QSM_RUNTIME_FIELD_NOISE_H

#include "patches.h"
#include "scan.h"

namespace qsm::host {

// Returns the standard deviation of the noise [ppm] of a field whose mask has this box.
double field_noise(const Scan &scan, const Box &box, int threads);

// Returns the weight of the edges [ppm mm] for a field with that noise.
double alpha_of_noise(double sigma_ppm, const Geometry &geometry);

}  // namespace qsm::host

#endif
