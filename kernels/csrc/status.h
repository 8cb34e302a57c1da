// A status code and its message, which the calling thread keeps.
#ifndef QSM_STATUS_H
#define QSM_STATUS_H

#include <new>

#include "qsm_cuda.h"

namespace qsm {

using Status = qsm_cuda_status;

// Keeps the message (printf's format) for qsm_cuda_last_error() and returns the status.
Status fail(Status status, const char *format, ...) noexcept __attribute__((format(printf, 2, 3)));

// Runs the body of a C function: no exception may cross its edge.
template <class Body>
Status guarded(Body &&body) noexcept {
    try {
        return body();
    } catch (const std::bad_alloc &) {
        return fail(QSM_CUDA_OUT_OF_MEMORY, "out of host memory");
    } catch (...) {
        return fail(QSM_CUDA_INTERNAL_ERROR, "unexpected C++ exception; please report it");
    }
}

}  // namespace qsm

#define QSM_TRY(call)                                             \
    do {                                                          \
        if (const ::qsm::Status status_ = (call)) return status_; \
    } while (0)

#endif
