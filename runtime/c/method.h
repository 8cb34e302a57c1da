// Maps without a network: tv and tkd.
#ifndef QSM_RUNTIME_METHOD_H
#define QSM_RUNTIME_METHOD_H

#include <string>

#include "qsm_runtime.h"
#include "scan.h"

namespace qsm::host {

enum class Method { kNone, kTv, kTkd };

// Returns the method of a name; throws a usage error where there is none.
Method method_of(const std::string &name);

// Refuses parameters that mean nothing to a method, or to a network (kNone).
void require_params_of(Method method, const qsm_params &params);

// Returns the map of a scan, 0 outside its mask.
Volume reconstruct_by(Method method, const Scan &scan, const qsm_params &params, int threads,
                      qsm_facts &facts);

}  // namespace qsm::host

#endif
