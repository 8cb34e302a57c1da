#include "gpu.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "error.h"

namespace qsm::host {

namespace {

constexpr int kOutOfMemory = 2;  // CUDA_ERROR_OUT_OF_MEMORY

std::string reason(const char *text) { return text ? text : "no reason given"; }

void *open_driver() {
    if (void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) return library;
    throw NoGpu("this machine has no NVIDIA driver (" + reason(dlerror()) + ")");
}

void *open_kernels() {
    const char *named = std::getenv("QSM_CUDA_LIBRARY");
    const std::string name = named ? named : "libqsm_cuda.so";
    if (void *library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    throw Error(QSM_ENGINE_ERROR, name + " cannot be loaded (" + reason(dlerror()) +
                                      "); build it (docs/c-abi.md) and name it in "
                                      "QSM_CUDA_LIBRARY, or set params.device to QSM_DEVICE_CPU");
}

template <class Function>
void find(void *library, const char *name, Function &function) {
    void *symbol = dlsym(library, name);
    if (!symbol) {
        throw Error(QSM_ENGINE_ERROR, std::string(name) +
                                          " is missing in a library for the GPU; "
                                          "it is too old");
    }
    function = reinterpret_cast<Function>(symbol);
}

}  // namespace

const Gpu &Gpu::get() {
    static const Gpu gpu;  // made again at the next call if it throws
    return gpu;
}

Gpu::Gpu() {
    void *driver = open_driver();
    int (*init)(unsigned);
    int (*count_gpus)(int *);
    find(driver, "cuInit", init);
    find(driver, "cuDeviceGetCount", count_gpus);
    find(driver, "cuGetErrorString", error_text_);
    int gpus = 0, failed = init(0);
    if (!failed) failed = count_gpus(&gpus);
    if (failed || !gpus) {
        const char *why = nullptr;
        if (failed) error_text_(failed, &why);
        throw NoGpu("the NVIDIA driver finds no GPU (" + reason(why) + ")");
    }
    find(driver, "cuMemAlloc_v2", allocate_);
    find(driver, "cuMemFree_v2", release_);
    find(driver, "cuMemcpyHtoDAsync_v2", upload_);
    find(driver, "cuMemcpyDtoHAsync_v2", download_);
    find(driver, "cuMemsetD8Async", zero_);
    find(driver, "cuStreamSynchronize", wait_);
    find(driver, "cuMemGetInfo_v2", memory_);
    find(driver, "cuCtxGetCurrent", current_);
    find(driver, "cuCtxSetCurrent", set_current_);
    void *library = open_kernels();
    decltype(&qsm_cuda_abi_version) version;
    decltype(&qsm_cuda_probe) probe;
    find(library, "qsm_cuda_abi_version", version);
    find(library, "qsm_cuda_last_error", last_error);
    if (version() != QSM_CUDA_ABI_VERSION) {
        throw Error(QSM_ENGINE_ERROR, text("libqsm_cuda has ABI %d, expected %d; build it again",
                                           version(), QSM_CUDA_ABI_VERSION));
    }
    find(library, "qsm_cuda_probe", probe);
    find(library, "qsm_cuda_dipole_workspace", dipole_workspace);
    find(library, "qsm_cuda_dipole_apply", dipole_apply);
    find(library, "qsm_cuda_patch_gather", gather);
    find(library, "qsm_cuda_patch_accumulate", accumulate);
    find(library, "qsm_cuda_patch_finish", finish);
    find(library, "qsm_cuda_combine", combine);
    find(library, "qsm_cuda_dot", dot);
    check(probe(nullptr));
}

void Gpu::check(qsm_cuda_status status) const {
    if (status == QSM_CUDA_OK) return;
    throw Error(status == QSM_CUDA_OUT_OF_MEMORY ? QSM_MEMORY_ERROR : QSM_ENGINE_ERROR,
                last_error());
}

void Gpu::checked(int result, const char *what) const {
    if (!result) return;
    const char *why = nullptr;
    error_text_(result, &why);
    throw Error(
        result == kOutOfMemory ? QSM_MEMORY_ERROR : QSM_ENGINE_ERROR,
        text("%s: %s (CUDA error %d)%s", what, why ? why : "unknown", result,
             result == kOutOfMemory ? "; use smaller patches or free the GPU's memory" : ""));
}

void *Gpu::allocate(size_t bytes) const {
    Pointer pointer = 0;
    checked(allocate_(&pointer, std::max<size_t>(bytes, 1)), "cannot allocate the GPU's memory");
    return reinterpret_cast<void *>(static_cast<uintptr_t>(pointer));
}

void Gpu::release(void *pointer) const noexcept { release_(reinterpret_cast<uintptr_t>(pointer)); }

void Gpu::upload(void *to, const void *from, size_t bytes, void *stream) const {
    checked(upload_(reinterpret_cast<uintptr_t>(to), from, bytes, stream),
            "cannot copy to the GPU");
}

void Gpu::download(void *to, const void *from, size_t bytes, void *stream) const {
    checked(download_(to, reinterpret_cast<uintptr_t>(from), bytes, stream),
            "cannot copy from the GPU");
    wait(stream);
}

void Gpu::zero(void *pointer, size_t bytes, void *stream) const {
    checked(zero_(reinterpret_cast<uintptr_t>(pointer), 0, bytes, stream), "cannot clear memory");
}

void Gpu::wait(void *stream) const { checked(wait_(stream), "the GPU failed"); }

size_t Gpu::free_bytes() const {
    size_t free = 0, total = 0;
    checked(memory_(&free, &total), "cannot ask for the GPU's memory");
    return free;
}

void *Gpu::context() const {
    void *context = nullptr;
    checked(current_(&context), "cannot ask for the current GPU");
    return context;
}

void Gpu::use(void *wanted) const {
    if (!context() && wanted) checked(set_current_(wanted), "cannot use the engine's GPU");
}

DeviceMemory::~DeviceMemory() {
    for (void *pointer : held_) gpu_.release(pointer);
}

}  // namespace qsm::host
