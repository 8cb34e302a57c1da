// What the caller asks for: parameters, callbacks, and what they mean before anything is computed.
#ifndef QSM_RUNTIME_REQUEST_H
#define QSM_RUNTIME_REQUEST_H

#include <string>

#include "error.h"
#include "planning.h"
#include "qsm_runtime.h"
#include "scan.h"

namespace qsm::host {

// The caller's callbacks.
class Caller {
  public:
    explicit Caller(const qsm_params &params) : params_(params) {}

    void log(qsm_log_level level, const std::string &line) const;

    // Says what will be done, and counts its steps.
    void begin(const Decision &decision, int64_t runs);

    // Before each step: throws if the caller wishes to stop.
    void poll() const;

    // After each step, and after the last, however many there were.
    void done();
    void end();

  private:
    const qsm_params &params_;
    int32_t done_ = 0, total_ = 0;
};

// Checks what can be checked of parameters without a network.
void require_params(const qsm_params &params);

// The data-consistency step that is asked for.
Correction correction_from(const qsm_params &params);

// Erodes the mask as the network wants it, and refuses geometries it was not trained for.
void prepare(Scan &scan, const Card &card, const qsm_params &params, const Caller &caller);

// What to say of a map that is not finite, of so many voxels if they were counted.
Error not_finite(size_t voxels = 0, const std::string &whose = "the network");

}  // namespace qsm::host

#endif
