// The whole volume when it fits the memory, otherwise the largest patches that do; see
// runtime/planning.py, which decides the same way.
#ifndef QSM_RUNTIME_PLANNING_H
#define QSM_RUNTIME_PLANNING_H

#include <string>
#include <vector>

#include "card.h"
#include "patches.h"
#include "qsm_runtime.h"
#include "scan.h"

namespace qsm::host {

// The form of the data-consistency step.
enum class Correction { kNone, kClosedForm, kConjugateGradients };

// What decides the memory of a run besides its patch plan.
struct Workload {
    const Card &card;
    const Scan &scan;
    std::string backend;
    Correction correction;
};

struct StageMemory {
    const char *stage;
    double bytes;
};

struct Decision {
    PatchPlan plan;
    std::string reason;
    bool exact;  // the plan gives the whole-volume result by construction
    std::vector<StageMemory> stages;

    double peak_bytes() const;
};

// Returns the predicted peak memory of every stage, above that before the run.
std::vector<StageMemory> predict(const Workload &workload, const PatchPlan &plan);

// Returns four fifths of the memory that the system and the control group have left.
double available_bytes();

// Returns how to run a volume within a memory limit. Throws a memory error if it does not fit, a
// usage error if the parameters contradict each other or the network.
Decision decide(const Workload &workload, const qsm_params &params, double limit_bytes);

}  // namespace qsm::host

#endif
