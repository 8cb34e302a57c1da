#include "status.h"

#include <cstdarg>
#include <cstdio>

namespace {
thread_local char message[512] = "";
}

qsm::Status qsm::fail(Status status, const char *format, ...) noexcept {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return status;
}

int32_t qsm_cuda_abi_version(void) { return QSM_CUDA_ABI_VERSION; }

const char *qsm_cuda_last_error(void) { return message; }
