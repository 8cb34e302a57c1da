// Runs a body over rows: on the GPU, or where CUDA does not compile, in two loops.
//
// A body has columns(), and row(index) that returns what is called with each column. All
// arithmetic and every load and store are in the body, so that the loops test it on a CPU.
#ifndef QSM_LAUNCH_H
#define QSM_LAUNCH_H

#include <cstdint>

#include "status.h"

#ifdef __CUDACC__
#include "device.h"
#endif

namespace qsm {

#ifdef __CUDACC__

constexpr int kRowsPerBlock = 8;  // a warp takes one row: neighbouring threads, neighbouring z

template <class Body>
__global__ void over_rows(const Body body, const int32_t rows) {
    const int64_t index = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.y;
    if (index >= rows) return;
    const auto row = body.row(static_cast<int32_t>(index));
    const int64_t columns = body.columns();  // 64 bits: the last step may pass 2^31
    for (int64_t column = threadIdx.x; column < columns; column += 32) {
        row(static_cast<int32_t>(column));
    }
}

// Enqueues the body.
template <class Body>
Status launch(const Body &body, int32_t rows, void *stream) {
    const auto blocks = static_cast<unsigned>((rows - 1) / kRowsPerBlock + 1);
    over_rows<<<blocks, dim3(32, kRowsPerBlock), 0, static_cast<cudaStream_t>(stream)>>>(body,
                                                                                        rows);
    return checked(cudaGetLastError(), "cannot launch a kernel");
}

#else

template <class Body>
Status launch(const Body &body, int32_t rows, void *) {
    for (int32_t index = 0; index < rows; ++index) {
        const auto row = body.row(index);
        for (int32_t column = 0; column < body.columns(); ++column) row(column);
    }
    return QSM_CUDA_OK;
}

#endif

}  // namespace qsm

#endif
