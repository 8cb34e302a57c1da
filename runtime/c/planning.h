// The whole volume when it fits the memory, otherwise the largest patches that do; see
// runtime/planning.py, which decides the same way.
#ifndef QSM_RUNTIME_PLANNING_H
#define QSM_RUNTIME_PLANNING_H

#include <functional>
#include <string>
#include <vector>

#include "card.h"
#include "patches.h"
#include "qsm_runtime.h"
#include "scan.h"

namespace qsm::host {

// The form of the data-consistency step.
enum class Correction { kNone, kClosedForm, kConjugateGradients };

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

// What decides how a volume is run. `stages` returns the predicted peak memory of every stage,
// above that before the run; infinite where the engine cannot run the plan's patches.
struct Demand {
    const Card &card;
    const Scan &scan;
    std::function<std::vector<StageMemory>(const PatchPlan &)> stages;
};

// Returns how to run a volume within a memory limit. Throws a memory error if it does not fit, a
// usage error if the parameters contradict each other or the network.
Decision decide(const Demand &demand, const qsm_params &params, double limit_bytes);

// Returns how to run a method that takes a whole grid, within a memory limit. Throws as above.
Decision decide_at_once(const Shape &grid, const char *method, double bytes, double limit_bytes);

}  // namespace qsm::host

#endif
