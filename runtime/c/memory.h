// Predicting the peak memory of a run before it begins, as runtime/memory.py does.
#ifndef QSM_RUNTIME_MEMORY_H
#define QSM_RUNTIME_MEMORY_H

#include <string>
#include <vector>

#include "planning.h"

namespace qsm::host {

// What decides the memory of a run on the CPU besides its patch plan.
struct HostMemory {
    const Card &card;
    const Scan &scan;
    std::string backend;
    Correction correction;
    double prepare_bytes;  // of its prior maps

    std::vector<StageMemory> stages(const PatchPlan &plan) const;
};

// Returns what making prior maps takes, with those that were made.
double prior_bytes(const std::vector<PriorMap> &priors, const Scan &scan);

// Returns the predicted peak of a method, which works on a grid with padding.
double tv_bytes(const Geometry &geometry, const Geometry &padded);
double tkd_bytes(const Geometry &geometry, const Geometry &padded);

// Returns what a caller allows: the limit that is set, or four fifths of the memory that the system
// and the control group have left.
double limit_bytes(const qsm_params &params);

}  // namespace qsm::host

#endif
