#include "device_session.h"
#include "error.h"

namespace qsm::host {

std::unique_ptr<DeviceSession> open_engine_session(const std::string &, const std::string &) {
    throw NoGpu(
        "this library was built without TensorRT (-DQSM_TENSORRT_INCLUDE=<folder of "
        "NvInferRuntime.h>)");
}

}  // namespace qsm::host
