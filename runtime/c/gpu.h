// The GPU through the driver's own library and libqsm_cuda, both looked for when they are first
// needed, so that this library runs where there is neither.
#ifndef QSM_RUNTIME_GPU_H
#define QSM_RUNTIME_GPU_H

#include <cstddef>
#include <vector>

#include "qsm_cuda.h"

namespace qsm::host {

// libqsm_cuda's functions, and the driver's as the caller's stream and current GPU want them. All
// that fails throws.
class Gpu {
  public:
    // Throws NoGpu if there is no driver or no GPU, another engine error if a library is missing.
    static const Gpu &get();

    decltype(&qsm_cuda_dipole_workspace) dipole_workspace;
    decltype(&qsm_cuda_dipole_apply) dipole_apply;
    decltype(&qsm_cuda_patch_gather) gather;
    decltype(&qsm_cuda_patch_accumulate) accumulate;
    decltype(&qsm_cuda_patch_finish) finish;
    decltype(&qsm_cuda_combine) combine;
    decltype(&qsm_cuda_dot) dot;
    decltype(&qsm_cuda_last_error) last_error;

    // Throws what a function of libqsm_cuda refused.
    void check(qsm_cuda_status status) const;

    void *allocate(size_t bytes) const;
    void release(void *pointer) const noexcept;
    void upload(void *to, const void *from, size_t bytes, void *stream) const;
    void download(void *to, const void *from, size_t bytes, void *stream) const;  // and wait
    void zero(void *pointer, size_t bytes, void *stream) const;
    void wait(void *stream) const;
    size_t free_bytes() const;

    // The calling thread's context; and take one where it has none.
    void *context() const;
    void use(void *context) const;

  private:
    Gpu();
    void checked(int result, const char *what) const;

    using Pointer = unsigned long long;
    int (*allocate_)(Pointer *, size_t);
    int (*release_)(Pointer);
    int (*upload_)(Pointer, const void *, size_t, void *);
    int (*download_)(void *, Pointer, size_t, void *);
    int (*zero_)(Pointer, unsigned char, size_t, void *);
    int (*wait_)(void *);
    int (*memory_)(size_t *, size_t *);
    int (*current_)(void **);
    int (*set_current_)(void *);
    int (*error_text_)(int, const char **);
};

// Device memory that is freed with this. Work that uses it must be done by then.
class DeviceMemory {
  public:
    explicit DeviceMemory(const Gpu &gpu) : gpu_(gpu) {}
    ~DeviceMemory();
    DeviceMemory(const DeviceMemory &) = delete;
    DeviceMemory &operator=(const DeviceMemory &) = delete;

    template <class T>
    T *make(size_t count) {
        held_.push_back(gpu_.allocate(count * sizeof(T)));
        return static_cast<T *>(held_.back());
    }

  private:
    const Gpu &gpu_;
    std::vector<void *> held_;
};

}  // namespace qsm::host

#endif
