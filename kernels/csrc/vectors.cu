#include "check_buffers.h"
#include "check_size.h"
#include "device.h"
#include "launch.h"
#include "vector_rows.h"

namespace qsm {
namespace {

static_assert((kFirstSums + kSecondSums) * sizeof(double) == QSM_CUDA_DOT_WORKSPACE, "the header");

Status check_count(int64_t count) {
    if (count >= 1 && count <= kMostVoxels) return QSM_CUDA_OK;
    return fail(count < 1 ? QSM_CUDA_BAD_SHAPE : QSM_CUDA_TOO_LARGE,
                "count must be 1 to %lld, got %lld", static_cast<long long>(kMostVoxels),
                static_cast<long long>(count));
}

size_t vector_bytes(int64_t count) { return sizeof(float) * static_cast<size_t>(count); }

Status check_coefficient(const char *name, const qsm_cuda_coefficient &c) {
    if (!c.numerator != !c.denominator) {
        return fail(QSM_CUDA_NULL_POINTER,
                    "%s has a numerator or a denominator; it needs both, or neither", name);
    }
    QSM_TRY(check_optional_pointer("numerator", c.numerator, alignof(double)));
    return check_optional_pointer("denominator", c.denominator, alignof(double));
}

Status combine(const Combine &body, void *stream) {
    QSM_TRY(check_count(body.count));
    QSM_TRY(check_coefficient("a", body.a));
    QSM_TRY(check_coefficient("b", body.b));
    QSM_TRY(check_pointer("x", body.x, alignof(float)));
    QSM_TRY(check_pointer("y", body.y, alignof(float)));
    const size_t bytes = vector_bytes(body.count);
    if (body.x != body.y) QSM_TRY(check_apart("x", body.x, bytes, "y", body.y, bytes));
    int gpu;
    QSM_TRY(require_gpu(gpu));
    QSM_TRY(require_device_memory({body.x, body.y, body.a.numerator, body.a.denominator,
                                   body.b.numerator, body.b.denominator},
                                  gpu));
    return launch(body, vector_rows(body.count), stream);
}

// The sum of a term of x and y, which may be the same.
template <class Term>
Status sum(int64_t count, const Term &term, const float *x, const float *y, double *result,
           void *workspace, void *stream) {
    QSM_TRY(check_count(count));
    QSM_TRY(check_pointer("x", x, alignof(float)));
    QSM_TRY(check_pointer("y", y, alignof(float)));
    QSM_TRY(check_pointer("result", result, alignof(double)));
    QSM_TRY(check_pointer("workspace", workspace, QSM_CUDA_WORKSPACE_ALIGNMENT));
    const size_t bytes = vector_bytes(count);
    QSM_TRY(check_apart("workspace", workspace, QSM_CUDA_DOT_WORKSPACE, "x", x, bytes));
    QSM_TRY(check_apart("workspace", workspace, QSM_CUDA_DOT_WORKSPACE, "y", y, bytes));
    QSM_TRY(check_apart("result", result, sizeof(double), "workspace", workspace,
                        QSM_CUDA_DOT_WORKSPACE));
    int gpu;
    QSM_TRY(require_gpu(gpu));
    QSM_TRY(require_device_memory({x, y, result, workspace}, gpu));
    auto *first = static_cast<double *>(workspace), *second = first + kFirstSums;
    QSM_TRY(launch(FirstSums<Term>{count, term, first}, kFirstSums / kLanes, stream));
    QSM_TRY(launch(LastSums{kFirstSums, kSecondSums, kLanes, first, second}, kSecondSums / kLanes,
                   stream));
    return launch(LastSums{kSecondSums, 1, 1, second, result}, 1, stream);
}

}  // namespace
}  // namespace qsm

qsm_cuda_status qsm_cuda_combine(int64_t count, qsm_cuda_coefficient a, const float *x,
                                 qsm_cuda_coefficient b, float *y, void *stream) {
    return qsm::guarded([&] { return qsm::combine({count, a, b, x, y}, stream); });
}

qsm_cuda_status qsm_cuda_dot(int64_t count, const float *x, const float *y, double *result,
                             void *workspace, void *stream) {
    return qsm::guarded([&] {
        return qsm::sum(count, qsm::Product{x, y}, x, y, result, workspace, stream);
    });
}

qsm_cuda_status qsm_cuda_count_beyond(int64_t count, const float *x, float limit, double *result,
                                      void *workspace, void *stream) {
    return qsm::guarded([&] {
        return qsm::sum(count, qsm::Beyond{x, limit}, x, x, result, workspace, stream);
    });
}
