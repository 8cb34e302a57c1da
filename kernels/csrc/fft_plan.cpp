#include "fft_plan.h"

#include <cuda_runtime_api.h>
#include <cufft.h>

#include <algorithm>

#include "device.h"

namespace qsm {
namespace {

const char *name_of(cufftResult result) {
    switch (result) {
        case CUFFT_INVALID_PLAN: return "CUFFT_INVALID_PLAN";
        case CUFFT_ALLOC_FAILED: return "CUFFT_ALLOC_FAILED";
        case CUFFT_INVALID_TYPE: return "CUFFT_INVALID_TYPE";
        case CUFFT_INVALID_VALUE: return "CUFFT_INVALID_VALUE";
        case CUFFT_INTERNAL_ERROR: return "CUFFT_INTERNAL_ERROR";
        case CUFFT_EXEC_FAILED: return "CUFFT_EXEC_FAILED";
        case CUFFT_SETUP_FAILED: return "CUFFT_SETUP_FAILED";
        case CUFFT_INVALID_SIZE: return "CUFFT_INVALID_SIZE";
        case CUFFT_UNALIGNED_DATA: return "CUFFT_UNALIGNED_DATA";
        case CUFFT_INVALID_DEVICE: return "CUFFT_INVALID_DEVICE";
        case CUFFT_NO_WORKSPACE: return "CUFFT_NO_WORKSPACE";
        case CUFFT_NOT_SUPPORTED: return "CUFFT_NOT_SUPPORTED";
        default: return "see cufftResult";
    }
}

Status checked_fft(cufftResult result, const char *failure) {
    if (result == CUFFT_SUCCESS) return QSM_CUDA_OK;
    cudaGetLastError();  // cuFFT leaves the CUDA error behind it, for the next check to find
    const Status status =
        result == CUFFT_ALLOC_FAILED ? QSM_CUDA_OUT_OF_MEMORY : QSM_CUDA_CUFFT_ERROR;
    return fail(status, "%s: %s (cuFFT error %d)", failure, name_of(result),
                static_cast<int>(result));
}

Status make_transform(const PlanKey &key, cufftType type, int &handle, size_t &bytes) {
    QSM_TRY(checked_fft(cufftCreate(&handle), "cannot create an FFT plan"));
    QSM_TRY(checked_fft(cufftSetAutoAllocation(handle, 0), "cannot set up an FFT plan"));
    int shape[] = {key.x, key.y, key.z};
    int half[] = {key.x, key.y, key.z / 2 + 1};
    const int voxels = key.x * key.y * key.z, frequencies = key.x * key.y * half[2];
    const bool to_half = type == CUFFT_R2C;
    return checked_fft(
        cufftMakePlanMany(handle, 3, shape, to_half ? shape : half, 1,
                          to_half ? voxels : frequencies, to_half ? half : shape, 1,
                          to_half ? frequencies : voxels, type, key.batch, &bytes),
        "cannot make an FFT plan");
}

}  // namespace

Status FftPlan::make(const PlanKey &key, std::shared_ptr<FftPlan> &made) {
    std::shared_ptr<FftPlan> plan(new FftPlan(key));
    size_t forward_bytes = 0, inverse_bytes = 0;
    QSM_TRY(make_transform(key, CUFFT_R2C, plan->forward_, forward_bytes));
    QSM_TRY(make_transform(key, CUFFT_C2R, plan->inverse_, inverse_bytes));
    plan->work_bytes_ = std::max(forward_bytes, inverse_bytes);
    made = std::move(plan);
    return QSM_CUDA_OK;
}

FftPlan::~FftPlan() {
    int current = 0;
    const bool moved = cudaGetDevice(&current) == cudaSuccess && current != key_.gpu &&
                       cudaSetDevice(key_.gpu) == cudaSuccess;
    // Transforms on any stream may still read the plan's tables. There is nobody to report a
    // failure to; the next call on the GPU meets it too.
    cudaDeviceSynchronize();
    for (const int handle : {forward_, inverse_}) {
        if (handle != -1) cufftDestroy(handle);
    }
    if (moved) cudaSetDevice(current);
    cudaGetLastError();
}

Status FftPlan::bind(void *work, void *stream) {
    for (const int handle : {forward_, inverse_}) {
        QSM_TRY(checked_fft(cufftSetWorkArea(handle, work), "cannot set the FFT's workspace"));
        QSM_TRY(checked_fft(cufftSetStream(handle, static_cast<cudaStream_t>(stream)),
                            "cannot set the FFT's stream"));
    }
    return QSM_CUDA_OK;
}

Status FftPlan::forward(const float *volumes, Complex *spectra) {
    // cuFFT's signature lacks a const; out of place it leaves the input as it is.
    return checked_fft(cufftExecR2C(forward_, const_cast<float *>(volumes),
                                    reinterpret_cast<cufftComplex *>(spectra)),
                       "the forward FFT failed");
}

Status FftPlan::inverse(Complex *spectra, float *volumes) {
    return checked_fft(
        cufftExecC2R(inverse_, reinterpret_cast<cufftComplex *>(spectra), volumes),
        "the inverse FFT failed");
}

}  // namespace qsm
