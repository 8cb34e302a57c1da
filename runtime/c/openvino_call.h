// How OpenVINO is called: in float32, and with its exceptions turned into ours.
#ifndef QSM_RUNTIME_OPENVINO_CALL_H
#define QSM_RUNTIME_OPENVINO_CALL_H

#include <new>
#include <openvino/runtime/properties.hpp>

#include "error.h"

namespace qsm::host {

// The precision is always stated: left alone, OpenVINO computes in bf16 on CPUs that can.
inline ov::AnyMap openvino_settings(int threads) {
    return {ov::hint::inference_precision(ov::element::f32),
            ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
            ov::inference_num_threads(threads)};
}

// Runs a body that calls OpenVINO. `what` says what failed, `fix` what to do about it.
template <class Body>
auto openvino_call(const char *what, const char *fix, Body &&body) {
    try {
        return body();
    } catch (const std::bad_alloc &) {
        throw;
    } catch (const std::exception &error) {
        throw Error(QSM_ENGINE_ERROR,
                    std::string(what) + " (" + last_line(error.what()) + "); " + fix);
    }
}

}  // namespace qsm::host

#endif
