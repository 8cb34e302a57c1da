// From what was measured to a susceptibility map, whole or in patches; see runtime/pipeline.py.
#ifndef QSM_RUNTIME_RECONSTRUCT_H
#define QSM_RUNTIME_RECONSTRUCT_H

#include <string>

#include "qsm_runtime.h"
#include "scan.h"
#include "session.h"

namespace qsm::host {

// The caller's callbacks.
class Caller {
  public:
    explicit Caller(const qsm_params &params) : params_(params) {}

    void log(qsm_log_level level, const std::string &line) const {
        if (params_.log) params_.log(level, line.c_str(), params_.user_data);
    }

    void expect(int32_t steps) { total_ = steps; }

    // Throws if the caller wishes to stop.
    void poll() const;
    void done();
    void all_done();

  private:
    const qsm_params &params_;
    int32_t done_ = 0, total_ = 0;
};

// Checks what can be checked of parameters without a network.
void require_params(const qsm_params &params);

// Returns the map of a scan, 0 outside its mask.
Volume reconstruct(Session &session, Scan &scan, const qsm_params &params, int threads);

}  // namespace qsm::host

#endif
