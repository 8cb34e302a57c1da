// The FFT plans that all functions share, and what a workspace for them holds.
#ifndef QSM_PLANS_H
#define QSM_PLANS_H

#include "check_buffers.h"
#include "fft_plan.h"
#include "plan_cache.h"

namespace qsm {

// Never destroyed: at exit CUDA may be gone before its plans are.
inline PlanCache<PlanKey, FftPlan> &plans() {
    static auto &cache = *new PlanCache<PlanKey, FftPlan>(QSM_CUDA_CACHED_PLANS);
    return cache;
}

inline Status find_plan(const qsm_cuda_dipole &op, int gpu, bool captured,
                        std::shared_ptr<FftPlan> &plan) {
    const PlanKey key{gpu, op.batch, op.shape[0], op.shape[1], op.shape[2]};
    return plans().find_or_make(key, captured, FftPlan::make, plan);
}

inline int32_t rows_of(const qsm_cuda_dipole &op) {
    return op.batch * op.shape[0] * op.shape[1];
}

inline size_t voxels_of(const qsm_cuda_dipole &op) {
    return static_cast<size_t>(rows_of(op)) * static_cast<size_t>(op.shape[2]);
}

inline size_t volume_bytes(const qsm_cuda_dipole &op) { return sizeof(float) * voxels_of(op); }

inline size_t whole_units(size_t bytes) {
    const size_t unit = QSM_CUDA_WORKSPACE_ALIGNMENT;
    return (bytes + unit - 1) / unit * unit;
}

inline size_t spectrum_bytes(const qsm_cuda_dipole &op) {
    const size_t columns = static_cast<size_t>(op.shape[2] / 2 + 1);
    return whole_units(sizeof(Complex) * static_cast<size_t>(rows_of(op)) * columns);
}

inline Status check_workspace(size_t bytes, size_t needed, const char *who_knows) {
    if (bytes >= needed) return QSM_CUDA_OK;
    return fail(QSM_CUDA_SMALL_WORKSPACE,
                "the workspace has %zu bytes, %zu are needed; ask %s()", bytes, needed, who_knows);
}


}  // namespace qsm

#endif
