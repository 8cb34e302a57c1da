// One step from a network's map towards the measured field; see kernels/data_consistency.py.
#ifndef QSM_RUNTIME_DATA_CONSISTENCY_H
#define QSM_RUNTIME_DATA_CONSISTENCY_H

#include <functional>

#include "dipole_filter.h"
#include "scan.h"

namespace qsm::host {

constexpr int32_t kCorrectionPadVoxels = 8;

// Makes a map consistent with the scan's field; 0 outside the mask. `iterations` of 0 is the closed
// form without mask. `step` is called before each step, and may throw.
void make_consistent(Volume &chi_ppm, const Scan &scan, double lambda, int32_t iterations,
                     int threads, const std::function<void()> &step);

}  // namespace qsm::host

#endif
