#include "check_buffers.h"
#include "check_dipole.h"
#include "device.h"
#include "fft_plan.h"
#include "launch.h"
#include "plan_cache.h"

namespace qsm {
namespace {

// Never destroyed: at exit CUDA may be gone before its plans are.
PlanCache<PlanKey, FftPlan> &plans() {
    static auto &cache = *new PlanCache<PlanKey, FftPlan>(QSM_CUDA_CACHED_PLANS);
    return cache;
}

Status find_plan(const qsm_cuda_dipole &op, int gpu, bool captured,
                 std::shared_ptr<FftPlan> &plan) {
    const PlanKey key{gpu, op.batch, op.shape[0], op.shape[1], op.shape[2]};
    return plans().find_or_make(key, captured, FftPlan::make, plan);
}

int32_t rows_of(const qsm_cuda_dipole &op) {
    return op.batch * op.shape[0] * op.shape[1];
}

size_t volume_bytes(const qsm_cuda_dipole &op) {
    return sizeof(float) * static_cast<size_t>(rows_of(op)) * static_cast<size_t>(op.shape[2]);
}

// The workspace holds the spectra, then cuFFT's scratch memory.
size_t spectrum_bytes(const qsm_cuda_dipole &op, const ScaleSpectrum &scale) {
    const size_t bytes = sizeof(Complex) * static_cast<size_t>(rows_of(op)) *
                         static_cast<size_t>(scale.columns());
    const size_t unit = QSM_CUDA_WORKSPACE_ALIGNMENT;
    return (bytes + unit - 1) / unit * unit;
}

Status check_workspace(size_t bytes, size_t needed) {
    if (bytes >= needed) return QSM_CUDA_OK;
    return fail(QSM_CUDA_SMALL_WORKSPACE,
                "the workspace has %zu bytes, %zu are needed; ask qsm_cuda_dipole_workspace()",
                bytes, needed);
}

Status check_buffers(const qsm_cuda_dipole &op, const ScaleSpectrum &scale, const float *x,
                     const float *y, const void *workspace, size_t workspace_bytes) {
    QSM_TRY(check_pointer("x", x, alignof(Complex)));
    QSM_TRY(check_pointer("y", y, alignof(Complex)));
    QSM_TRY(check_pointer("workspace", workspace, QSM_CUDA_WORKSPACE_ALIGNMENT));
    QSM_TRY(check_workspace(workspace_bytes, spectrum_bytes(op, scale)));
    const size_t bytes = volume_bytes(op);
    QSM_TRY(check_apart("x", x, bytes, "workspace", workspace, workspace_bytes));
    return check_apart("y", y, bytes, "workspace", workspace, workspace_bytes);
}

Status workspace_needed(const qsm_cuda_dipole *op, size_t *bytes) {
    ScaleSpectrum scale;
    QSM_TRY(check_dipole(op, scale));
    QSM_TRY(check_pointer("bytes", bytes, alignof(size_t)));
    int gpu;
    QSM_TRY(require_gpu(gpu));
    std::shared_ptr<FftPlan> plan;
    QSM_TRY(find_plan(*op, gpu, false, plan));
    *bytes = spectrum_bytes(*op, scale) + plan->work_bytes();
    return QSM_CUDA_OK;
}

Status apply(const qsm_cuda_dipole *op, const float *x, float *y, void *workspace,
             size_t workspace_bytes, void *stream) {
    ScaleSpectrum scale;
    QSM_TRY(check_dipole(op, scale));
    QSM_TRY(check_buffers(*op, scale, x, y, workspace, workspace_bytes));
    int gpu;
    QSM_TRY(require_gpu(gpu));
    QSM_TRY(require_device_memory({x, y, workspace}, gpu));
    bool captured;
    QSM_TRY(is_captured(stream, captured));
    std::shared_ptr<FftPlan> plan;
    QSM_TRY(find_plan(*op, gpu, captured, plan));
    const size_t bytes = spectrum_bytes(*op, scale);
    QSM_TRY(check_workspace(workspace_bytes, bytes + plan->work_bytes()));

    scale.spectrum = static_cast<Complex *>(workspace);
    const std::lock_guard<std::mutex> lock(plan->in_use);
    QSM_TRY(plan->bind(static_cast<char *>(workspace) + bytes, stream));
    QSM_TRY(plan->forward(x, scale.spectrum));
    QSM_TRY(launch(scale, rows_of(*op), stream));
    return plan->inverse(scale.spectrum, y);
}

}  // namespace
}  // namespace qsm

qsm_cuda_dipole qsm_cuda_dipole_default(void) {
    return {1, {1, 1, 1}, {1, 1, 1}, {0, 0, 1}, QSM_CUDA_DIPOLE, 0.12, 0.01};
}

qsm_cuda_status qsm_cuda_dipole_workspace(const qsm_cuda_dipole *op, size_t *bytes) {
    return qsm::guarded([&] { return qsm::workspace_needed(op, bytes); });
}

qsm_cuda_status qsm_cuda_dipole_apply(const qsm_cuda_dipole *op, const float *x, float *y,
                                      void *workspace, size_t workspace_bytes, void *stream) {
    return qsm::guarded([&] { return qsm::apply(op, x, y, workspace, workspace_bytes, stream); });
}

qsm_cuda_status qsm_cuda_release_plans(void) {
    return qsm::guarded([] {
        qsm::plans().clear();
        return QSM_CUDA_OK;
    });
}
