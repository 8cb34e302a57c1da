#include "check_buffers.h"
#include "check_size.h"
#include "device.h"
#include "launch.h"
#include "patch_rows.h"

namespace qsm {
namespace {

Status check_box(const qsm_cuda_patch *box) {
    if (!box) return fail(QSM_CUDA_NULL_POINTER, "box is a null pointer");
    QSM_TRY(check_size("the volume", box->volume, box->channels, "channels"));
    return check_size("the patch", box->size, box->channels, "channels");
}

Status check_inside(const qsm_cuda_patch &box) {
    for (int axis = 0; axis < 3; ++axis) {
        const int64_t first = box.start[axis], end = first + box.size[axis];
        if (first < 0 || end > box.volume[axis]) {
            return fail(QSM_CUDA_BAD_SHAPE,
                        "the box must lie inside the volume: axis %d spans %lld to %lld of %d",
                        axis, static_cast<long long>(first), static_cast<long long>(end),
                        box.volume[axis]);
        }
    }
    return QSM_CUDA_OK;
}

int32_t rows_of(const qsm_cuda_patch &box) {
    return box.channels * box.size[0] * box.size[1];
}

size_t patch_bytes(const qsm_cuda_patch &box) {
    return sizeof(float) * static_cast<size_t>(rows_of(box)) * static_cast<size_t>(box.size[2]);
}

size_t channel_bytes(const qsm_cuda_patch &box) {
    return sizeof(float) * static_cast<size_t>(voxels_of_volume(box));
}

size_t volume_bytes(const qsm_cuda_patch &box) {
    return channel_bytes(box) * static_cast<size_t>(box.channels);
}

template <class Body>
Status run(const Body &body, std::initializer_list<const void *> pointers, void *stream) {
    int gpu;
    QSM_TRY(require_gpu(gpu));
    QSM_TRY(require_device_memory(pointers, gpu));
    return launch(body, rows_of(body.box), stream);
}

Status gather(const qsm_cuda_patch *box, const float *volume, float *patch, void *stream) {
    QSM_TRY(check_box(box));
    QSM_TRY(check_pointer("volume", volume, alignof(float)));
    QSM_TRY(check_pointer("patch", patch, alignof(float)));
    QSM_TRY(
        check_apart("patch", patch, patch_bytes(*box), "volume", volume, volume_bytes(*box)));
    return run(Gather{*box, volume, patch}, {volume, patch}, stream);
}

Status accumulate(const Accumulate &body, void *stream) {
    QSM_TRY(check_pointer("patch", body.patch, alignof(float)));
    QSM_TRY(check_pointer("window_x", body.window_x, alignof(float)));
    QSM_TRY(check_pointer("window_y", body.window_y, alignof(float)));
    QSM_TRY(check_pointer("window_z", body.window_z, alignof(float)));
    QSM_TRY(check_pointer("total", body.total, alignof(float)));
    QSM_TRY(check_optional_pointer("weight", body.weight, alignof(float)));
    const size_t total_bytes = volume_bytes(body.box);
    QSM_TRY(check_apart("patch", body.patch, patch_bytes(body.box), "total", body.total,
                        total_bytes));
    QSM_TRY(check_apart("weight", body.weight, channel_bytes(body.box), "total", body.total,
                        total_bytes));
    return run(body,
               {body.patch, body.window_x, body.window_y, body.window_z, body.total, body.weight},
               stream);
}

Status finish(const Finish &body, void *stream) {
    QSM_TRY(check_inside(body.box));
    QSM_TRY(check_pointer("total", body.total, alignof(float)));
    QSM_TRY(check_optional_pointer("weight", body.weight, alignof(float)));
    QSM_TRY(check_pointer("output", body.output, alignof(float)));
    QSM_TRY(check_apart("output", body.output, patch_bytes(body.box), "total", body.total,
                        volume_bytes(body.box)));
    QSM_TRY(check_apart("output", body.output, patch_bytes(body.box), "weight", body.weight,
                        channel_bytes(body.box)));
    return run(body, {body.total, body.weight, body.mask, body.output}, stream);
}

}  // namespace
}  // namespace qsm

qsm_cuda_status qsm_cuda_patch_gather(const qsm_cuda_patch *box, const float *volume, float *patch,
                                      void *stream) {
    return qsm::guarded([&] { return qsm::gather(box, volume, patch, stream); });
}

qsm_cuda_status qsm_cuda_patch_accumulate(const qsm_cuda_patch *box, const float *patch,
                                          const float *window_x, const float *window_y,
                                          const float *window_z, float *total, float *weight,
                                          void *stream) {
    return qsm::guarded([&] {
        QSM_TRY(qsm::check_box(box));
        return qsm::accumulate({*box, patch, window_x, window_y, window_z, total, weight}, stream);
    });
}

qsm_cuda_status qsm_cuda_patch_finish(const qsm_cuda_patch *box, const float *total,
                                      const float *weight, const uint8_t *mask, float *output,
                                      void *stream) {
    return qsm::guarded([&] {
        QSM_TRY(qsm::check_box(box));
        return qsm::finish({*box, total, weight, mask, output}, stream);
    });
}
