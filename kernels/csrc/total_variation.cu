#include <algorithm>
#include <vector>

#include "check_dipole.h"
#include "device.h"
#include "launch.h"
#include "plans.h"
#include "tv_solve.h"
#include "tv_split.h"

namespace qsm {
namespace {

constexpr char kWhoKnows[] = "qsm_cuda_tv_workspace";

// The workspace holds both spectra, then cuFFT's scratch memory.
size_t own_bytes(const qsm_cuda_dipole &grid) { return 2 * spectrum_bytes(grid); }

Status workspace_needed(const qsm_cuda_dipole *grid, size_t *bytes) {
    ScaleSpectrum scale;
    QSM_TRY(check_dipole(grid, scale));
    QSM_TRY(check_pointer("bytes", bytes, alignof(size_t)));
    int gpu;
    QSM_TRY(require_gpu(gpu));
    std::shared_ptr<FftPlan> plan;
    QSM_TRY(find_plan(*grid, gpu, false, plan));
    *bytes = own_bytes(*grid) + plan->work_bytes();
    return QSM_CUDA_OK;
}

struct Buffer {
    const char *name;
    const void *pointer;
    size_t bytes, alignment;
};

Status check_equation(const qsm_cuda_tv *tv, Placement &placement) {
    if (!tv) return fail(QSM_CUDA_NULL_POINTER, "tv is a null pointer");
    ScaleSpectrum scale;
    QSM_TRY(check_dipole(&tv->grid, scale));
    placement = scale.placement;
    const auto mu1 = static_cast<float>(tv->mu1), mu3 = static_cast<float>(tv->mu3);
    const auto limit = static_cast<float>(tv->alpha / tv->mu1);
    if (mu1 > 0 && mu3 > 0 && limit >= 0 && std::isfinite(mu1 + mu3 + limit)) return QSM_CUDA_OK;
    return fail(QSM_CUDA_BAD_MULTIPLIER,
                "mu1 and mu3 must be positive and alpha not negative, all finite in float32, got "
                "%g, %g and %g",
                tv->mu1, tv->mu3, tv->alpha);
}

// Only buffers that are never written may overlap; those given beside the volumes are.
Status check_buffers(const qsm_cuda_tv &tv, std::vector<Buffer> buffers) {
    const size_t voxels = voxels_of(tv.grid), bytes = sizeof(float) * voxels;
    for (const auto &[name, volume] : {std::pair{"x", tv.x}, std::pair{"q2", tv.q2},
                                       std::pair{"b", tv.b}, std::pair{"s3", tv.s3}}) {
        buffers.push_back({name, volume, bytes, alignof(Complex)});
    }
    const auto written = static_cast<std::ptrdiff_t>(buffers.size());
    buffers.push_back({"field", tv.field, bytes, alignof(float)});
    buffers.push_back({"mask", tv.mask, voxels, 1});
    buffers.push_back({"support", tv.support, voxels, 1});
    for (auto one = buffers.begin(); one != buffers.end(); ++one) {
        QSM_TRY(check_pointer(one->name, one->pointer, one->alignment));
        for (auto other = buffers.begin(); other != std::min(one, buffers.begin() + written);
             ++other) {
            QSM_TRY(check_apart(other->name, other->pointer, other->bytes, one->name,
                                one->pointer, one->bytes));
        }
    }
    return QSM_CUDA_OK;
}

Status solve(const qsm_cuda_tv *tv, void *workspace, size_t workspace_bytes, void *stream) {
    TvSolve body{};
    QSM_TRY(check_equation(tv, body.placement));
    QSM_TRY(check_buffers(
        *tv, {{"workspace", workspace, workspace_bytes, QSM_CUDA_WORKSPACE_ALIGNMENT}}));
    const qsm_cuda_dipole &grid = tv->grid;
    const size_t own = own_bytes(grid);
    QSM_TRY(check_workspace(workspace_bytes, own, kWhoKnows));
    int gpu;
    QSM_TRY(require_gpu(gpu));
    QSM_TRY(require_device_memory({tv->x, tv->q2, tv->b, workspace}, gpu));
    bool captured;
    QSM_TRY(is_captured(stream, captured));
    std::shared_ptr<FftPlan> plan;
    QSM_TRY(find_plan(grid, gpu, captured, plan));
    QSM_TRY(check_workspace(workspace_bytes, own + plan->work_bytes(), kWhoKnows));
    char *const memory = static_cast<char *>(workspace);
    body.b = reinterpret_cast<Complex *>(memory);
    body.q2 = reinterpret_cast<Complex *>(memory + spectrum_bytes(grid));
    body.mu3 = static_cast<float>(tv->mu3);
    for (int axis = 0; axis < 3; ++axis) {
        const double h = grid.voxel_size_mm[axis];
        body.weight[axis] = static_cast<float>(tv->mu1 / (h * h));
    }
    const std::lock_guard<std::mutex> lock(plan->in_use);
    QSM_TRY(plan->bind(memory + own, stream));
    QSM_TRY(plan->forward(tv->b, body.b));
    QSM_TRY(plan->forward(tv->q2, body.q2));
    QSM_TRY(launch(body, rows_of(grid), stream));
    QSM_TRY(plan->inverse(body.b, tv->x));
    return plan->inverse(body.q2, tv->q2);
}

Status split(const qsm_cuda_tv *tv, const float *s1, float *s1_next, void *stream) {
    Placement placement;
    QSM_TRY(check_equation(tv, placement));
    const size_t bytes = 3 * volume_bytes(tv->grid);
    QSM_TRY(check_buffers(*tv, {{"s1", s1, bytes, alignof(float)},
                                {"s1_next", s1_next, bytes, alignof(float)}}));
    int gpu;
    QSM_TRY(require_gpu(gpu));
    QSM_TRY(require_device_memory(
        {s1, s1_next, tv->x, tv->q2, tv->b, tv->s3, tv->field, tv->mask, tv->support}, gpu));
    TvSplit body{};
    body.tv = *tv;
    body.s1 = s1;
    body.s1_next = s1_next;
    body.voxels = static_cast<int64_t>(voxels_of(tv->grid));
    for (int axis = 0; axis < 3; ++axis) {
        body.per_mm[axis] = static_cast<float>(1 / tv->grid.voxel_size_mm[axis]);
    }
    body.limit = static_cast<float>(tv->alpha / tv->mu1);
    body.mu1 = static_cast<float>(tv->mu1);
    body.mu3 = static_cast<float>(tv->mu3);
    return launch(body, rows_of(tv->grid), stream);
}

}  // namespace
}  // namespace qsm

qsm_cuda_status qsm_cuda_tv_workspace(const qsm_cuda_dipole *grid, size_t *bytes) {
    return qsm::guarded([&] { return qsm::workspace_needed(grid, bytes); });
}

qsm_cuda_status qsm_cuda_tv_solve(const qsm_cuda_tv *tv, void *workspace, size_t workspace_bytes,
                                  void *stream) {
    return qsm::guarded([&] { return qsm::solve(tv, workspace, workspace_bytes, stream); });
}

qsm_cuda_status qsm_cuda_tv_split(const qsm_cuda_tv *tv, const float *s1, float *s1_next,
                                  void *stream) {
    return qsm::guarded([&] { return qsm::split(tv, s1, s1_next, stream); });
}
