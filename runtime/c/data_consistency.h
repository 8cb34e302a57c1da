// One step from a network's map towards the measured field; see kernels/data_consistency.py.
#ifndef QSM_RUNTIME_DATA_CONSISTENCY_H
#define QSM_RUNTIME_DATA_CONSISTENCY_H

#include "request.h"
#include "scan.h"

namespace qsm::host {

constexpr int32_t kCorrectionPadVoxels = 8;  // of the closed form
constexpr double kSolved =
    1e-12;  // a squared residual this much smaller than the first is rounding

// Makes a map consistent with the scan's field; 0 outside the mask. `iterations` of 0 is the closed
// form without mask.
void make_consistent(Volume &chi_ppm, const Scan &scan, double lambda, int32_t iterations,
                     int threads, Caller &caller);

}  // namespace qsm::host

#endif
