#include <utility>

#include "check_buffers.h"
#include "check_dipole.h"
#include "device.h"
#include "launch.h"
#include "place_grid.h"
#include "plans.h"

namespace qsm {
namespace {

// The workspace holds the placement, then the spectra, then cuFFT's scratch memory.
size_t placement_bytes() { return whole_units(sizeof(Placement)); }

size_t own_bytes(const qsm_cuda_dipole &op) { return placement_bytes() + spectrum_bytes(op); }

constexpr char kWhoKnows[] = "qsm_cuda_dipole_workspace";

// Where the geometry lies on the GPU; null pointers: the operator has it.
struct DeviceGeometry {
    const float *voxel_size_mm, *b0_direction;
};

Status check_device_geometry(const DeviceGeometry &geometry, const void *workspace,
                             size_t workspace_bytes) {
    const size_t bytes = 3 * sizeof(float);
    for (const auto &[name, pointer] : {std::pair{"voxel_size_mm", geometry.voxel_size_mm},
                                        std::pair{"b0_direction", geometry.b0_direction}}) {
        QSM_TRY(check_pointer(name, pointer, alignof(float)));
        QSM_TRY(check_apart(name, pointer, bytes, "workspace", workspace, workspace_bytes));
    }
    return QSM_CUDA_OK;
}

Status check_buffers(const qsm_cuda_dipole &op, const float *x, const float *y,
                     const void *workspace, size_t workspace_bytes) {
    QSM_TRY(check_pointer("x", x, alignof(Complex)));
    QSM_TRY(check_pointer("y", y, alignof(Complex)));
    QSM_TRY(check_pointer("workspace", workspace, QSM_CUDA_WORKSPACE_ALIGNMENT));
    QSM_TRY(check_workspace(workspace_bytes, own_bytes(op), kWhoKnows));
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
    *bytes = own_bytes(*op) + plan->work_bytes();
    return QSM_CUDA_OK;
}

// cuFFT needs more for a prime size than for some larger ones. Its manual names the worst case:
// 8 complex numbers for each one transformed. For what small transforms need beside it names
// none.
Status workspace_bound(const qsm_cuda_dipole *op, size_t *bytes) {
    ScaleSpectrum scale;
    QSM_TRY(check_dipole(op, scale));
    QSM_TRY(check_pointer("bytes", bytes, alignof(size_t)));
    const size_t beside = size_t{1} << 20;
    *bytes = own_bytes(*op) + 8 * sizeof(Complex) / sizeof(float) * volume_bytes(*op) + beside;
    return QSM_CUDA_OK;
}

Status enqueue(const qsm_cuda_dipole &op, const DeviceGeometry &geometry, ScaleSpectrum scale,
               const float *x, float *y, void *workspace, size_t workspace_bytes, void *stream) {
    QSM_TRY(check_buffers(op, x, y, workspace, workspace_bytes));
    int gpu;
    QSM_TRY(require_gpu(gpu));
    QSM_TRY(require_device_memory(
        {x, y, workspace, geometry.voxel_size_mm, geometry.b0_direction}, gpu));
    bool captured;
    QSM_TRY(is_captured(stream, captured));
    std::shared_ptr<FftPlan> plan;
    QSM_TRY(find_plan(op, gpu, captured, plan));
    QSM_TRY(check_workspace(workspace_bytes, own_bytes(op) + plan->work_bytes(), kWhoKnows));
    char *const memory = static_cast<char *>(workspace);
    scale.spectrum = reinterpret_cast<Complex *>(memory + placement_bytes());
    if (geometry.voxel_size_mm) {
        auto *const placed = reinterpret_cast<Placement *>(memory);
        scale.placed = placed;
        QSM_TRY(launch(PlaceGrid{geometry.voxel_size_mm, geometry.b0_direction, scale.placement,
                                 placed}, 1, stream));
    }
    const std::lock_guard<std::mutex> lock(plan->in_use);
    QSM_TRY(plan->bind(memory + own_bytes(op), stream));
    QSM_TRY(plan->forward(x, scale.spectrum));
    QSM_TRY(launch(scale, rows_of(op), stream));
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

qsm_cuda_status qsm_cuda_dipole_workspace_bound(const qsm_cuda_dipole *op, size_t *bytes) {
    return qsm::guarded([&] { return qsm::workspace_bound(op, bytes); });
}

qsm_cuda_status qsm_cuda_dipole_apply(const qsm_cuda_dipole *op, const float *x, float *y,
                                      void *workspace, size_t workspace_bytes, void *stream) {
    return qsm::guarded([&] {
        qsm::ScaleSpectrum scale;
        QSM_TRY(qsm::check_dipole(op, scale));
        return qsm::enqueue(*op, {}, scale, x, y, workspace, workspace_bytes, stream);
    });
}

qsm_cuda_status qsm_cuda_dipole_apply_device_geometry(const qsm_cuda_dipole *op,
                                                      const float *voxel_size_mm,
                                                      const float *b0_direction, const float *x,
                                                      float *y, void *workspace,
                                                      size_t workspace_bytes, void *stream) {
    return qsm::guarded([&] {
        qsm::ScaleSpectrum scale;
        QSM_TRY(qsm::check_all_but_geometry(op, scale));
        const qsm::DeviceGeometry geometry{voxel_size_mm, b0_direction};
        QSM_TRY(qsm::check_device_geometry(geometry, workspace, workspace_bytes));
        return qsm::enqueue(*op, geometry, scale, x, y, workspace, workspace_bytes, stream);
    });
}

qsm_cuda_status qsm_cuda_release_plans(void) {
    return qsm::guarded([] {
        qsm::plans().clear();
        return QSM_CUDA_OK;
    });
}
