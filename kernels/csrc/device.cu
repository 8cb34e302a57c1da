#include "device.h"

#include <cuda_runtime_api.h>
#include <cufft.h>

namespace qsm {
namespace {

__global__ void nothing() {}  // stands for all kernels: they are built for the same GPUs

Status status_of(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return QSM_CUDA_OK;
        case cudaErrorMemoryAllocation:
            return QSM_CUDA_OUT_OF_MEMORY;
        case cudaErrorInsufficientDriver:
        case cudaErrorCallRequiresNewerDriver:
        case cudaErrorSystemDriverMismatch:
        case cudaErrorStubLibrary:
            return QSM_CUDA_NO_DRIVER;
        case cudaErrorNoDevice:
        case cudaErrorDevicesUnavailable:
            return QSM_CUDA_NO_GPU;
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorUnsupportedPtxVersion:
            return QSM_CUDA_UNSUPPORTED_GPU;
        default:
            return QSM_CUDA_CUDA_ERROR;
    }
}

Status driver_failure(cudaError_t error) {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
        return fail(QSM_CUDA_NO_DRIVER,
                    "no NVIDIA driver found (CUDA error %d); a GPU and its driver are needed",
                    static_cast<int>(error));
    }
    return fail(QSM_CUDA_NO_DRIVER,
                "the NVIDIA driver supports CUDA %d.%d, this library was built with CUDA %d.%d "
                "(CUDA error %d); update the driver or rebuild the library",
                driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
                CUDART_VERSION % 1000 / 10, static_cast<int>(error));
}

}  // namespace

Status checked(int cuda_error, const char *failure) noexcept {
    const auto error = static_cast<cudaError_t>(cuda_error);
    if (error == cudaSuccess) return QSM_CUDA_OK;
    cudaGetLastError();  // or the next check of a launch would find this error
    const Status status = status_of(error);
    if (status == QSM_CUDA_NO_DRIVER) return driver_failure(error);
    return fail(status, "%s: %s (CUDA error %d)", failure, cudaGetErrorString(error), cuda_error);
}

Status require_gpu(int &gpu) {
    int count = 0;
    QSM_TRY(checked(cudaGetDeviceCount(&count), "no GPU can be used"));
    if (count == 0) return fail(QSM_CUDA_NO_GPU, "the NVIDIA driver sees no GPU");
    return checked(cudaGetDevice(&gpu), "no current GPU");
}

Status require_device_memory(std::initializer_list<const void *> pointers, int gpu) {
    for (const void *pointer : pointers) {
        if (!pointer) continue;
        cudaPointerAttributes memory;
        QSM_TRY(checked(cudaPointerGetAttributes(&memory, pointer), "cannot look up a pointer"));
        if (memory.type == cudaMemoryTypeDevice && memory.device != gpu) {
            return fail(QSM_CUDA_WRONG_MEMORY,
                        "pointer %p lies on GPU %d, the current one is GPU %d; set the device first",
                        pointer, memory.device, gpu);
        }
        if (memory.type != cudaMemoryTypeUnregistered) continue;
        int any_memory = 0;
        QSM_TRY(checked(
            cudaDeviceGetAttribute(&any_memory, cudaDevAttrPageableMemoryAccess, gpu),
            "cannot ask what memory the GPU can use"));
        if (!any_memory) {
            return fail(QSM_CUDA_WRONG_MEMORY,
                        "pointer %p is to host memory; copy the data to GPU %d first", pointer, gpu);
        }
    }
    return QSM_CUDA_OK;
}

Status is_captured(void *stream, bool &captured) {
    cudaStreamCaptureStatus state;
    QSM_TRY(checked(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &state),
                    "cannot use the stream"));
    captured = state != cudaStreamCaptureStatusNone;
    return QSM_CUDA_OK;
}

}  // namespace qsm

qsm_cuda_status qsm_cuda_probe(qsm_cuda_versions *versions) {
    return qsm::guarded([&] {
        int driver = 0, cufft = 0;
        if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
        if (cufftGetVersion(&cufft) != CUFFT_SUCCESS) cufft = 0;
        if (versions) *versions = {CUDART_VERSION, driver, cufft};
        int gpu;
        QSM_TRY(qsm::require_gpu(gpu));
        cudaFuncAttributes attributes;
        return qsm::checked(cudaFuncGetAttributes(&attributes, qsm::nothing),
                            "this library has no code for the GPU; rebuild it with its "
                            "architecture in CMAKE_CUDA_ARCHITECTURES");
    });
}
