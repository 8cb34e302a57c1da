// How the plugin tells TensorRT what went wrong.
#ifndef QSM_TENSORRT_REPORT_H
#define QSM_TENSORRT_REPORT_H

#include <NvInferRuntime.h>

#include "status.h"

namespace qsm {

// Sends this thread's latest failure to the recorder, if there is one, and to the logger.
void report(nvinfer1::IErrorRecorder *recorder) noexcept;

// Runs the body of a method, and reports its failure.
template <class Body>
Status reported(nvinfer1::IErrorRecorder *recorder, Body &&body) noexcept {
    const Status status = guarded(body);
    if (status) report(recorder);
    return status;
}

}  // namespace qsm

#endif
