// What the library asks of CUDA beside kernels and transforms. No CUDA header is needed here, so
// that the tests can stand in for the GPU.
#ifndef QSM_DEVICE_H
#define QSM_DEVICE_H

#include <initializer_list>

#include "status.h"

namespace qsm {

// Turns a cudaError_t into a status; `failure` says what could not be done.
Status checked(int cuda_error, const char *failure) noexcept;

// Sets `gpu` to the calling thread's current GPU, once a driver and a GPU are there.
Status require_gpu(int &gpu);

// Refuses pointers that the current GPU cannot use; null ones pass.
Status require_device_memory(std::initializer_list<const void *> pointers, int gpu);

// Says whether a CUDA graph is recording what is enqueued on the stream.
Status is_captured(void *stream, bool &captured);

}  // namespace qsm

#endif
