// Predicting the peak memory of a run before it begins, as runtime/memory.py does; what differs is
// the transform, which is made of matrix products here.
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

    std::vector<StageMemory> stages(const PatchPlan &plan) const;
};

// Returns four fifths of the memory that the system and the control group have left.
double available_bytes();

}  // namespace qsm::host

#endif
