// Products of sizes, bounded.
#ifndef QSM_CHECK_SIZE_H
#define QSM_CHECK_SIZE_H

#include <cstdint>

#include "status.h"

namespace qsm {

// cuFFT plans count elements in 32 bits, and a grid of blocks must fit too.
constexpr int64_t kMostVoxels = INT32_MAX;

// Checks that sizes are positive and their product, times `count`, within the limit.
inline Status check_size(const char *what, const int32_t (&shape)[3], int32_t count,
                         const char *counted) {
    if (count < 1) return fail(QSM_CUDA_BAD_SHAPE, "%s must be at least 1, got %d", counted, count);
    int64_t voxels = count;
    for (const int32_t n : shape) {
        if (n < 1) {
            return fail(QSM_CUDA_BAD_SHAPE, "%s must be three positive sizes, got %d x %d x %d",
                        what, shape[0], shape[1], shape[2]);
        }
        voxels = voxels > kMostVoxels ? voxels : voxels * n;
    }
    if (voxels <= kMostVoxels) return QSM_CUDA_OK;
    return fail(QSM_CUDA_TOO_LARGE,
                "%s of %d x %d x %d (%s: %d) has more than %lld voxels; split it", what, shape[0],
                shape[1], shape[2], counted, count, static_cast<long long>(kMostVoxels));
}

}  // namespace qsm

#endif
