#include "tensorrt_report.h"

#include <atomic>
#include <cstdio>

namespace {

// TensorRT hands it over when it loads the library by its path.
std::atomic<nvinfer1::ILoggerFinder *> finder{nullptr};

nvinfer1::ILogger *find_logger() {
    nvinfer1::ILoggerFinder *const found = finder;
    return found ? found->findLogger() : nullptr;
}

}  // namespace

void qsm::report(nvinfer1::IErrorRecorder *recorder) noexcept {
    char line[600];
    std::snprintf(line, sizeof line, "DipoleConv: %s", qsm_cuda_last_error());
    try {
        if (recorder) recorder->reportError(nvinfer1::ErrorCode::kFAILED_EXECUTION, line);
        if (nvinfer1::ILogger *const logger = find_logger()) {
            logger->log(nvinfer1::ILogger::Severity::kERROR, line);
            return;
        }
    } catch (...) {  // the logger is the application's own; what it does not take goes below
    }
    std::fprintf(stderr, "%s\n", line);
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(
    nvinfer1::ILoggerFinder *given) {
    finder = given;
}
