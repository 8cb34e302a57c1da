#include "device_session.h"
#include "error.h"

namespace qsm::host {

std::unique_ptr<DeviceSession> open_plan_session(const std::string &path) {
    throw Error(QSM_ENGINE_ERROR,
                path +
                    ": this library was built without TensorRT, which runs plans; build it with "
                    "-DQSM_TENSORRT_INCLUDE=<folder of NvInferRuntime.h>, or open an .onnx file");
}

}  // namespace qsm::host
